"""`gen2embed evaluate --ablation`: checks what is asked for, reads the inputs to fit on, and loads the model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from gen2embed_mteb.benchmarks import open_benchmark
from gen2embed_mteb.config import AblationOptions, EvaluationConfig, ModelOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import is_first_process
from gen2embed_mteb.evaluation.run_folder import UNKNOWN
from gen2embed_mteb.flags import from_flags

BENCHMARKS = ("mmeb", "mmeb-mini")


def run_ablation(arguments: argparse.Namespace, options: AblationOptions) -> tuple[str, int]:
    """Table every prompt, readout and calibration of a model.

    Args:
        arguments: The parsed flags of `evaluate`.
        options: What is tabled.

    Returns:
        What is printed: the table, in the first process alone; and the exit status.

    Raises:
        Gen2EmbedError: A flag does not go with the ablation, or the model or the data cannot be used.
    """
    loading, name = from_flags(ModelOptions, arguments), arguments.benchmark
    _refuse_single_choices(arguments, name)
    _, _, data_dir, image_dir = open_benchmark(name, arguments.data_dir, arguments.image_dir)
    if not data_dir:
        raise Gen2EmbedError(f"--data_dir is needed for --benchmark {name}")
    output_dir = arguments.output_dir or str(Path("results") / name / Path(loading.model_name).name / "ablation")
    settings = {"data_dir": data_dir, "image_dir": image_dir, "output_dir": output_dir}

    def config(**of_model: Any) -> EvaluationConfig:
        made: EvaluationConfig = from_flags(EvaluationConfig, arguments, **settings, **of_model)
        return made

    from gen2embed_mteb.mini.benchmark import MMEB_MINI
    from gen2embed_mteb.mmeb import MMEB
    from gen2embed_mteb.mmeb.ablation.ablate import ablate
    from gen2embed_mteb.mmeb.ablation.ablation_report import check_ablation_reports, text_table, write_ablation

    benchmark = MMEB_MINI if name == "mmeb-mini" else MMEB
    checked = config(fingerprint=UNKNOWN)
    benchmark.select(checked.subsets, checked.meta_tasks)
    # Settings, inputs to fit on and the output folder are checked before a model is loaded, which can take minutes.
    check_ablation_reports(checked, options, benchmark.name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        inputs = _fit_inputs(options.ablation_data, checked, Path(folder)) if options.ablation_data else None
        from gen2embed_mteb.embedder.fingerprint import fingerprint
        from gen2embed_mteb.embedder.model import Gen2Embed
        from gen2embed_mteb.evaluation.method import facts_of

        model = Gen2Embed(loading.model_name, layout=loading.layout, min_side=checked.min_side, **loading.arguments())
        known = facts_of(model, loading.model_name)
        final = config(revision=model.revision, fingerprint=fingerprint(model), **known)
        check_ablation_reports(final, options, benchmark.name)
        result = ablate(model, benchmark, final, options, inputs)
    if not is_first_process():
        return "", int(result.too_many_errors)
    write_ablation(result, final, options)
    lines = [text_table(result, final), f"\n{result.num_encoded:,} inputs encoded. Written to {output_dir}"]
    return "\n".join(filter(None, [*lines, result.verdict])) + "\n", int(result.too_many_errors)


def _refuse_single_choices(arguments: argparse.Namespace, benchmark: str) -> None:
    """Refuse flags that choose one of what the ablation tables, and benchmarks that compare otherwise."""
    if benchmark not in BENCHMARKS:
        raise Gen2EmbedError(f"--ablation is for {' and '.join(BENCHMARKS)}; leave it out for --benchmark {benchmark}")
    names = ("prompt_mode", "readout", "readout_norm", "calibration", "truncate_dim", "rerank")
    given = [f"--{name}" for name in names if getattr(arguments, name)]
    given += ["--scoring"] if arguments.scoring != "cosine" else []
    given += ["--pooling"] if arguments.pooling != "last" else []
    if arguments.engine != "local":
        raise Gen2EmbedError("--ablation encodes in its own way, in this process; leave --engine out")
    if given:
        raise Gen2EmbedError(
            f"{', '.join(given)} cannot be combined with --ablation, which tables prompts, readouts, calibrations and "
            "scores itself (--ablation_prompts, --ablation_readouts, --ablation_data), in full width and without "
            "reranking; leave "
            f"{'it' if len(given) == 1 else 'them'} out"
        )


def _fit_inputs(data_dir: str, config: EvaluationConfig, folder: Path) -> Any:
    """Read the inputs that calibrations are fitted on, as many as `gen2embed calibrate` takes by default."""
    from gen2embed_mteb.mmeb.ablation.ablate import FitInputs
    from trainers.calibration import CalibrateConfig, read
    from trainers.data.training_data import open_training_data

    wanted = CalibrateConfig(
        data_dir=data_dir,
        follow_links=config.follow_links,
        remote_images=config.remote_images,
        exif_orientation=config.exif_orientation,
    )
    data = open_training_data(wanted, folder / "images")
    found = read(data, wanted.limit)
    return FitInputs(found.queries, found.documents, data.images, Path(data_dir).name, len(found.rejected))
