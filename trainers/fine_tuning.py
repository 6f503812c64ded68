"""Fine-tunes a model from sampling files: `gen2embed train`, or `torchrun --nproc_per_node=8 -m trainers.train`.

1. Flags and sampling files are read; training data, images and the benchmark are looked up.
2. The model is loaded on the CPU, and its adapter is attached.
3. Training begins, or goes on at a checkpoint; the model is evaluated as the flags say.
4. `output_dir` receives the merged model, the adapter, the model card, and `train.json`, which says what was run; times
   are in `timing.json`. If the run is killed at any moment and started again with `--resume_from_checkpoint true`, it
   ends in the same files, except for the times.

Mistakes are reported in the first two steps, before anything is moved to a GPU. The flags are those of `TrainConfig`
and every training argument of transformers and sentence-transformers; FSDP and DeepSpeed are set up by their usual
configuration files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.sampler import BatchSamplers
from transformers import HfArgumentParser
from transformers.integrations import get_reporting_integration_callbacks

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from gen2embed_mteb.embedder.model_folder.loading import text_alone, width_by_files
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import find_images, installed_versions, refuse_images
from gen2embed_mteb.flags import add_flags
from gen2embed_mteb.mmeb.evaluate import images_in
from gen2embed_mteb.mmeb.tables import open_subsets
from gen2embed_mteb.storage.atomic import remove_stale
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.storage.paths import expand_home
from trainers.batches.dataset import training_dataset
from trainers.batches.sampled import data_name, open_sampled_data, read_samplings, warn_of_other_model
from trainers.batches.sampler import SahaBatchSampler
from trainers.config import TrainConfig
from trainers.evaluator import MmebEvaluator
from trainers.loss.chosen import loss_of
from trainers.loss.matryoshka import check_widths
from trainers.output.card import data_section, widths_section
from trainers.output.checkpoints import WRITER
from trainers.output.figures import without_times
from trainers.output.folder import RUN_FILE, agreed, check_output, checkpoint_to_go_on, finished
from trainers.recipe import (
    OFFICIAL,
    OFFICIAL_TARGETS,
    SahaTrainingArguments,
    bf16_supported,
    recipe_batch,
    refusing_flags,
)
from trainers.sampling.files import Sampling
from trainers.trainer import SahaTrainer

logger = logging.getLogger(__name__)

DECISIVE_ARGUMENTS = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "world_size",
    "bf16",
    "fp16",
)


def train(config: TrainConfig, args: SahaTrainingArguments) -> dict[str, Any]:
    """Train and save a model.

    Args:
        config: Which model to train, on which data.
        args: Training arguments; `output_dir` receives everything.

    Returns:
        The content of `train.json`.

    Raises:
        DataError: Training data or benchmark are not where they should be, or are damaged.
        FileNotFoundError: The images are not found.
        ForeignFileError: `output_dir` holds something that this command did not write.
        OSError: The disk is full.
        SamplingError: A sampling file is missing or damaged, or was made with other data or another k.
        ValueError: A setting does not fit the data, the model or an earlier run in `output_dir`.
    """
    if config.matryoshka_dims:
        name = resolve(config.model_name) or config.model_name
        width = width_by_files(name, revision=config.revision, gguf_file=config.gguf_file)
        check_widths(config.matryoshka_dims, config.matryoshka_weights, width)
        if width is not None and config.matryoshka_dims[0] < width:
            logger.warning(
                "matryoshka_dims begins with %d: whole vectors, of %d dimensions, get no loss of their own; name %d, "
                "too, if they are to be used",
                config.matryoshka_dims[0],
                width,
                width,
            )
    agreed(args, lambda: check_output(args.output_dir, _inputs(config)))
    samplings = read_samplings(config.processed_data_path, config.subsets, config.sampled_k)
    record = _record(config, args, samplings)
    output = OwnedFolder(args.output_dir, WRITER)
    if done := agreed(args, lambda: finished(args, record)):
        logger.warning("%s was finished before; nothing was trained", args.output_dir)
        if args.process_index == 0:
            with output.exclusive():
                remove_stale(output.path, older_than=0)
                output.write_json(RUN_FILE, done)  # a killed run may not have noted it as written
        return dict(done)
    agreed(args, lambda: output.check(output.known()))
    checkpoint = agreed(args, lambda: checkpoint_to_go_on(args, record))
    args.resume_from_checkpoint = None  # the model card would show it, but must be the same as without resuming
    with args.main_process_first(local=False, desc="looking up the data"):
        data = open_sampled_data(
            samplings,
            config.data_dir,
            config.image_dir,
            follow_links=config.follow_links,
            exif_orientation=config.exif_orientation,
            remote_images=config.remote_images,
        )
        training_set = training_dataset(data, samplings, args.seed, config.explicit_negatives)
        evaluator, evaluated = _evaluator(config, args)
    args.batch_sampler = partial(SahaBatchSampler, sampling=training_set.clusters, mix_subsets=config.mix_subsets)
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every batch has text, and the adapter is on the language model
    # The trainer makes its own sampler later, with the model on its device; a wrong batch size is reported here
    # already.
    args.batch_sampler(training_set.dataset, args.train_batch_size, num_processes=args.world_size)
    name = resolve(config.model_name) or config.model_name
    no_images = text_alone(name, revision=config.revision, gguf_file=config.gguf_file)
    sampled = {sampling.record["subset"] for sampling in samplings}
    refuse_images(no_images, {one.name: one.has_images for one in data.subsets if one.name in sampled})
    refuse_images(no_images, evaluated)
    model = _load(config, args)
    warn_of_other_model(samplings, model, config.model_name)
    # A folder has no card on the Hub, so there is nothing to look up.
    model.model_card_data.local_files_only = Path(resolve(config.model_name) or config.model_name).is_dir()
    model.model_card_data.train_datasets = [{"name": data_name(samplings)}]
    trainer = SahaTrainer(
        model,
        args,
        training_set.dataset,
        images=data.images,
        resize=config.resize,
        min_side=config.min_side,
        exif_orientation=config.exif_orientation,
        max_length=config.max_length,
        query_prompt_in_training=config.query_prompt_in_training,
        card_section=data_section(samplings, training_set, config.model_name),
        loss=loss_of(config, model, gather_across_devices=args.world_size > 1),
        evaluator=evaluator,
    )
    with output.exclusive() if trainer.is_world_process_zero() else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            remove_stale(output.path, older_than=0)
            output.write_json(RUN_FILE, record)
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        record |= {"metrics": without_times(outcome.metrics | _last_evaluation(trainer))}
        trainer.card_section += widths_section(config.matryoshka_dims, config.matryoshka_weights, record["metrics"])
        trainer.save_model()
        if trainer.is_world_process_zero():
            output.write_json(RUN_FILE, record)
    return record


def _inputs(config: TrainConfig) -> dict[str, str | Path]:
    """Return the places that the run reads, by flag."""
    processed = Path(config.processed_data_path).expanduser()
    return {
        "model_name": resolve(config.model_name) or config.model_name,
        "processed_data_path": processed if processed.is_dir() else processed.parent,
        "data_dir": config.data_dir,
        "image_dir": config.image_dir,
        "eval_data_dir": config.eval_data_dir,
        "eval_image_dir": config.eval_image_dir,
    }


def _last_evaluation(trainer: SahaTrainer) -> dict[str, float]:
    """Return the figures of the model that is saved; evaluate it unless that was done after the last step."""
    if trainer.evaluator is None:
        return {}
    last: dict[str, float] = trainer.state.log_history[-2] if len(trainer.state.log_history) > 1 else {}
    name = f"eval_{trainer.evaluator.primary_metric}"
    if name in last and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {metric: figure for metric, figure in last.items() if metric.startswith("eval_")}
    return trainer.evaluate()


def _load(config: TrainConfig, args: SahaTrainingArguments) -> Gen2Embed:
    half = args.bf16 and torch.cuda.is_available() and not args.use_cpu and not args.fsdp
    model = Gen2Embed(
        config.model_name,
        prompt_mode=config.prompt_mode,
        readout=config.readout,
        readout_norm=config.applies_norm,
        gguf_file=config.gguf_file,
        revision=config.revision,
        device="cpu",  # the trainer moves the model when all is checked
        model_kwargs={"dtype": config.dtype or ("bfloat16" if half else "float32")},
    )
    # The adapter's first weights are drawn here, before the trainer sets the seed.
    torch.manual_seed(args.seed)
    family = family_of(model[0].config.model_type)
    is_official = config.lora_targets == [OFFICIAL]
    targets = OFFICIAL_TARGETS if is_official else config.lora_targets or family.lora_targets
    new_adapter(
        model[0].model,
        targets,
        everywhere=is_official,
        allow_missing=is_official or (family.is_generic and not config.lora_targets),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        dora=config.dora,
    )
    return model


def _evaluator(
    config: TrainConfig, args: SahaTrainingArguments
) -> tuple[MmebEvaluator | None, Mapping[str, Callable[[], bool]]]:
    """Return the evaluator, if one is asked for, and what tells of each of its datasets whether it has images."""
    if not config.eval_benchmark:
        return None, {}
    if args.fsdp or (args.deepspeed and args.hf_deepspeed_config.is_zero3()):
        raise Gen2EmbedError(
            f"eval_benchmark is {config.eval_benchmark}, but no process holds all weights under FSDP or ZeRO-3; leave "
            "it out, and run gen2embed evaluate on the result"
        )
    from gen2embed_mteb.mmeb import MMEB

    benchmark, data_dir, image_dir = MMEB, config.eval_data_dir, config.eval_image_dir
    if config.eval_benchmark == "mmeb-mini":
        from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure
        from gen2embed_mteb.mini.places import evaluation_places

        benchmark = MMEB_MINI
        data_dir, image_dir = map(str, evaluation_places(ensure("eval", config.eval_data_dir or None)))
    settings = EvaluationConfig(
        data_dir=data_dir,
        image_dir=image_dir,
        follow_links=config.follow_links,
        exif_orientation=config.exif_orientation,
        remote_images=tuple(config.remote_images),
        output_dir=args.output_dir,
        subsets=tuple(config.eval_subsets),
        limit=config.eval_limit,
        model_name=config.model_name,
        fingerprint="of each step's model",
    )
    # A missing benchmark is reported now, not at the first evaluation.
    tables = open_subsets(data_dir, benchmark.select(settings.subsets, ()).datasets, settings.split)
    find_images(data_dir, image_dir, follow_links=config.follow_links)
    return MmebEvaluator(benchmark, settings, config.matryoshka_dims), images_in(tables, settings.limit, settings)


def _record(config: TrainConfig, args: SahaTrainingArguments, samplings: Sequence[Sampling]) -> dict[str, Any]:
    """Return the record of what is run; with equal `recipe`, `arguments` and `sampling` a run can be resumed."""
    evaluation = {"eval_benchmark", "eval_data_dir", "eval_image_dir", "eval_subsets", "eval_limit"}
    places = {"processed_data_path", "data_dir", "image_dir", "follow_links", "remote_images"}
    settings = dataclasses.asdict(config)
    arguments = args.to_dict()
    return {
        "recipe": {name: value for name, value in settings.items() if name not in evaluation | places},
        "arguments": {name: arguments.get(name, getattr(args, name, None)) for name in DECISIVE_ARGUMENTS},
        "sampling": {sampling.record["subset"]: sampling.record["sha256"] for sampling in samplings},
        "places": {name: settings[name] for name in sorted(places)},
        "versions": installed_versions(),
    }


def finished_before(config: TrainConfig, args: SahaTrainingArguments) -> dict[str, Any] | None:
    """Return the content of `train.json` if this run is finished, here or on another machine; None otherwise.

    Args:
        config: As for `train`; no model and no data is read.
        args: As for `train`.

    Raises:
        Gen2EmbedError: The folder holds another run.
        SamplingError: The sampling files cannot be used.
    """
    samplings = read_samplings(config.processed_data_path, config.subsets, config.sampled_k)
    return finished(args, _record(config, args, samplings), elsewhere=True)


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> tuple[TrainConfig, SahaTrainingArguments]:
    """Read the flags; a batch size that is not given follows from the method of the sampling files.

    Args:
        argv: The flags; None: those of the command line.
        prog: The program's name in its help.

    Raises:
        SamplingError: The sampling files cannot be used.
        ValueError: A value is out of its range.
    """
    parser = flag_parser(prog)
    given = vars(parser.parse_args(expand_home(sys.argv[1:] if argv is None else argv)))
    config = TrainConfig(**values_of(TrainConfig, given))
    if given["batch_sampler"] != BatchSamplers.BATCH_SAMPLER:
        raise Gen2EmbedError(f"batch_sampler is {given['batch_sampler']}; leave it out, batches are made of clusters")
    if given["bf16"] is None:
        given["bf16"] = bf16_supported() and not given["use_cpu"] and not given["fp16"]
    if given["per_device_train_batch_size"] is None:
        # This comes before the arguments are made, since DeepSpeed's configuration copies the batch size then.
        record = read_samplings(config.processed_data_path, config.subsets, config.sampled_k)[0].record
        width = record["settings"]["num_hard_negatives"] + 1 if record["method"] == "saha" else 1
        given["per_device_train_batch_size"] = recipe_batch(record["method"], width)
    arguments = values_of(SahaTrainingArguments, given)
    if config.eval_benchmark and arguments["eval_strategy"] == "no":
        arguments |= {"eval_strategy": "steps", "eval_steps": arguments["eval_steps"] or arguments["save_steps"]}
    with refusing_flags(RuntimeError):
        args = SahaTrainingArguments(**arguments)
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()  # raises an error if its package is missing
    if args.eval_strategy != "no" and not config.eval_benchmark:
        raise Gen2EmbedError(f"eval_strategy is {args.eval_strategy.value}; say on what: --eval_benchmark mmeb-mini")
    return config, args


def flag_parser(prog: str | None = None) -> HfArgumentParser:
    """Return the parser of `gen2embed train`: our flags, then every training argument of the libraries.

    Args:
        prog: The program's name in its help.
    """
    parser = HfArgumentParser(
        (), prog=prog, description="fine-tune on what `gen2embed sample` wrote", allow_abbrev=False
    )
    add_flags(parser, TrainConfig, valued_switches=True)
    parser._add_dataclass_arguments(SahaTrainingArguments)
    parser.set_defaults(per_device_train_batch_size=None, bf16=None)
    return parser


def values_of(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a dataclass, of parsed flags."""
    return {field.name: given[field.name] for field in dataclasses.fields(kind) if field.init}


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Read flags, train, and print where the result is; arguments and errors are those of `parse` and `train`."""
    config, args = parse(argv, prog)
    train(config, args)
    if args.process_index == 0:
        sys.stdout.write(f"Written to {args.output_dir}\n")
