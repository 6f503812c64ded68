"""A whole run of stage 1: `gen2embed distill`, or `torchrun --nproc_per_node=8 -m trainers.distillation`.

1. Flags are checked, the texts are read, and the teacher's vectors are opened or computed.
2. The student is loaded on the CPU, in four bits if asked for, and an adapter is attached to its language model.
3. Training begins, or goes on at a checkpoint. Texts alone are read, so that a vision tower never runs.
4. `output_dir` receives the merged model, which any command takes as `--model_name`, the adapter, the model card, and
   `train.json`, which says what was run.

The output folder, checkpoints and resuming are those of `gen2embed train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import HfArgumentParser
from transformers.integrations import get_reporting_integration_callbacks

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import linear_names, new_adapter
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.flags import add_flags, from_flags
from gen2embed_mteb.storage.atomic import remove_stale
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.storage.paths import expand_home
from trainers.data.training_data import TrainingData, open_training_data
from trainers.distillation.config import DistillArguments, DistillConfig
from trainers.distillation.loss import DistillationLoss
from trainers.distillation.teacher import TeacherVectors, identity_of_file, vectors_in_file, vectors_of_model
from trainers.distillation.texts import Texts, read_texts
from trainers.distillation.trainer import DistillTrainer
from trainers.fine_tuning import DECISIVE_ARGUMENTS, values_of
from trainers.output.checkpoints import WRITER
from trainers.output.figures import without_times
from trainers.output.folder import RUN_FILE, agreed, check_output, checkpoint_to_go_on, finished
from trainers.recipe import bf16_supported, refusing_flags

logger = logging.getLogger(__name__)


def distill(config: DistillConfig, args: DistillArguments) -> dict[str, Any]:
    """Train a student on a teacher's similarities, and save it.

    Args:
        config: Which student, which teacher, on which texts.
        args: Training arguments; `output_dir` receives everything.

    Returns:
        The content of `train.json`.

    Raises:
        DataError: The texts are not where they should be, or are damaged.
        ForeignFileError: `output_dir` holds something that this command did not write.
        Gen2EmbedError: A setting does not fit the data, the model, the teacher or an earlier run in `output_dir`.
        OSError: The disk is full.
    """
    if config.qlora and find_spec("bitsandbytes") is None:
        raise Gen2EmbedError("qlora needs bitsandbytes, which is not installed: pip install 'gen2embed[qlora]'")
    agreed(args, lambda: check_output(args.output_dir, _inputs(config, args)))
    output = OwnedFolder(args.output_dir, WRITER)
    with (
        args.main_process_first(local=False, desc="reading the texts"),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        data = open_training_data(config, Path(folder) / "images")
        texts = read_texts(data, config)
    num_rows = args.train_batch_size * args.world_size
    if len(texts.rows) < num_rows:
        raise Gen2EmbedError(
            f"{config.data_dir} has {len(texts.rows):,} usable rows, but a step takes {num_rows:,}; pass a smaller "
            "--batch_size"
        )
    record = _record(config, args, texts)
    if done := agreed(args, lambda: finished(args, record)):
        logger.warning("%s was finished before; nothing was trained", args.output_dir)
        if args.process_index == 0:
            with output.exclusive():
                remove_stale(output.path, older_than=0)
                output.write_json(RUN_FILE, done)
        return dict(done)
    agreed(args, lambda: output.check(output.known()))
    checkpoint = agreed(args, lambda: checkpoint_to_go_on(args, record))
    args.resume_from_checkpoint = None
    args.dataloader_drop_last = True  # batches of one size: with another number of texts the loss is another one
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False
    teacher = _teacher(config, args, texts, data)
    model = _student(config, args)
    model.model_card_data.local_files_only = Path(resolve(config.model_name) or config.model_name).is_dir()
    model.model_card_data.train_datasets = [{"name": Path(config.data_dir).name}]
    trainer = DistillTrainer(
        model,
        args,
        training_rows(texts),
        max_length=config.max_length,
        card_section=_card_section(config, texts),
        loss=DistillationLoss(
            model,
            teacher,
            tau=config.tau,
            direction=config.direction,
            diagonal=config.diagonal,
            mini_batch_size=config.sub_batch_size,
            gather_across_devices=args.world_size > 1,
        ),
        base=lambda: _load(config, dtype="auto")[0].model,
    )
    with output.exclusive() if trainer.is_world_process_zero() else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            remove_stale(output.path, older_than=0)
            output.write_json(RUN_FILE, record)
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        record |= {"metrics": without_times(outcome.metrics)}
        trainer.save_model()
        if trainer.is_world_process_zero():
            output.write_json(RUN_FILE, record)
    return record


def training_rows(texts: Texts) -> Dataset:
    """Return the rows as `DistillationLoss` and a trainer of sentence-transformers take them.

    Args:
        texts: The texts.

    Returns:
        One column per text of a row, and `label`, the numbers of its texts.
    """
    columns = {
        name: [texts.distinct[number] for number in texts.rows[:, place].tolist()]
        for place, name in enumerate(texts.columns)
    }
    return Dataset.from_dict({**columns, "label": texts.rows.tolist()})


def _inputs(config: DistillConfig, args: DistillArguments) -> dict[str, str | Path]:
    """Return the places that the run reads, by flag."""
    return {
        "model_name": resolve(config.model_name) or config.model_name,
        "data_dir": config.data_dir,
        "teacher": config.teacher and (resolve(config.teacher) or config.teacher),
        "teacher_dir": config.teacher_folder(args.output_dir) if config.teacher else "",
    }


def _teacher(config: DistillConfig, args: DistillArguments, texts: Texts, data: TrainingData) -> TeacherVectors:
    if config.teacher_vectors:
        return vectors_in_file(config.teacher_vectors, texts)
    found = vectors_of_model(
        config.teacher,
        texts,
        config.teacher_folder(args.output_dir),
        data.images,
        prompt=config.teacher_prompt,
        device=str(args.device),
        share=Share.from_environment(),
    )
    gc.collect()  # the teacher gives its memory back before the student needs it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _student(config: DistillConfig, args: DistillArguments) -> Gen2Embed:
    half = args.bf16 and torch.cuda.is_available() and not args.use_cpu and not args.fsdp
    model = _load(config, dtype=config.dtype or ("bfloat16" if half else "float32"), qlora=config.qlora)
    if model.calibration is not None:
        raise Gen2EmbedError(
            f"{config.model_name} is calibrated, which training would make wrong; distill the model that it was made "
            "of, and calibrate the result"
        )
    torch.manual_seed(args.seed)  # the adapter's first weights are drawn here, before the trainer sets the seed
    new_adapter(
        model[0].model,
        config.lora_targets or linear_names(model[0].model),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        dora=config.dora,
    )
    return model


def _load(config: DistillConfig, *, dtype: str, qlora: bool = False) -> Gen2Embed:
    weights: dict[str, Any] = {"dtype": dtype}
    if qlora:
        from transformers import BitsAndBytesConfig

        compute = torch.float32 if dtype == "float32" else torch.bfloat16
        weights["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    try:
        return Gen2Embed(
            config.model_name,
            prompt_mode=config.prompt_mode,
            readout=config.readout,
            readout_norm=config.applies_norm,
            gguf_file=config.gguf_file,
            revision=config.revision,
            device="cpu",  # the trainer moves the model when all is checked
            model_kwargs=weights,
        )
    except ImportError as error:
        if not qlora:
            raise
        raise Gen2EmbedError(f"qlora: {one_line(error)}") from error


def _record(config: DistillConfig, args: DistillArguments, texts: Texts) -> dict[str, Any]:
    """Return the record of what is run; with equal `recipe`, `arguments` and `sampling` a run can be resumed."""
    places = {"data_dir", "image_dir", "follow_links", "remote_images", "teacher_vectors", "teacher_dir"}
    settings = dataclasses.asdict(config)
    arguments = args.to_dict()
    file = config.teacher_vectors
    return {
        "command": "distill",
        "recipe": {name: value for name, value in settings.items() if name not in places},
        "arguments": {name: arguments.get(name, getattr(args, name, None)) for name in DECISIVE_ARGUMENTS},
        "sampling": {"texts": texts.digest(), "teacher_vectors": identity_of_file(file) if file else ""},
        "counts": {"rows": len(texts.rows), "texts": len(texts.distinct), "rejected": len(texts.rejected)},
        "places": {name: settings[name] for name in sorted(places)},
        "versions": installed_versions(),
    }


def _card_section(config: DistillConfig, texts: Texts) -> str:
    kind = "texts" if texts.width == 1 else "pairs of texts"
    data = f"`{Path(config.data_dir).name}`"
    teacher = f"`{config.teacher}`" if config.teacher else f"the vectors in `{Path(config.teacher_vectors).name}`"
    return "\n".join(
        [
            "### Distillation",
            "",
            f"- Student: `{config.model_name}`, its language model alone, under the prompt `{config.prompt_mode}`",
            f"- Teacher: {teacher}",
            f"- Data: {data}, {len(texts.rows):,} {kind}, {len(texts.distinct):,} distinct texts",
            f"- Settings: `tau` {config.tau}, `direction` {config.direction}, `diagonal` {config.diagonal}",
            "- All tensors without an adapter are those of the student, bit for bit",
        ]
    )


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[DistillConfig, DistillArguments]:
    """Read the flags.

    Args:
        argv: The flags; None: those of the command line.
        prog: The program's name in its help.

    Raises:
        Gen2EmbedError: A value is out of its range.
    """
    parser = flag_parser(prog)
    parsed = parser.parse_args(expand_home(sys.argv[1:] if argv is None else argv))
    config: DistillConfig = from_flags(DistillConfig, parsed)
    given = vars(parsed)
    if given["bf16"] is None:
        given["bf16"] = bf16_supported() and not given["use_cpu"] and not given["fp16"]
    with refusing_flags(RuntimeError):
        args = DistillArguments(**values_of(DistillArguments, given))
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # raises an error if its package is missing
    if args.eval_strategy != "no":
        raise Gen2EmbedError(
            f"eval_strategy is {args.eval_strategy.value}, but nothing is evaluated here; leave it out, and evaluate "
            "the result (gen2embed evaluate)"
        )
    return config, args


def flag_parser(prog: str | None = None) -> HfArgumentParser:
    """Return the parser of `gen2embed distill`: our flags, then every training argument of the libraries.

    Args:
        prog: The program's name in its help.
    """
    parser = HfArgumentParser(
        (), prog=prog, description="teach a language model which texts are alike", allow_abbrev=False
    )
    add_flags(parser, DistillConfig, valued_switches=True)
    parser._add_dataclass_arguments(DistillArguments)
    parser.set_defaults(bf16=None)
    return parser


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read flags, train, and print where the result is; arguments and errors are those of `parse` and `distill`."""
    config, args = parse(argv, prog)
    distill(config, args)
    if args.process_index == 0:
        sys.stdout.write(f"Written to {args.output_dir}\n")
