"""Checks what is missing before the first run begins: settings, data, models and output folders, but no weights.

The runs of one table can take days, and a mistake in the last of them would otherwise be noticed at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.run import image_source
from gen2embed_mteb.flags import from_flags
from gen2embed_mteb.table_command.models import check_model
from gen2embed_mteb.table_command.plans import Run
from gen2embed_mteb.table_command.records import evaluation_config, parsed


def check(runs: Sequence[Run], trained: Sequence[Path] = ()) -> None:
    """Refuse runs that cannot be made as far as files tell; nothing is encoded.

    Args:
        runs: The runs that are missing.
        trained: The folders of models that are trained here, which may not be there yet.

    Raises:
        Gen2EmbedError: A setting, a table, a model or an output folder cannot be used.
        FileNotFoundError: There is no such model, or there are no images.
    """
    seen: set[tuple[Any, ...]] = set()
    for run in runs:
        if run.command == "train":
            _check_training(run)
            continue
        arguments = parsed(run)
        places = (run.command, arguments.data_dir, arguments.image_dir, getattr(arguments, "benchmark", ""))
        model = (arguments.model_name, arguments.prompt_mode, arguments.layout, arguments.num_crops)
        if run.command == "evaluate":
            _check_evaluation(run, read=places not in seen)
        else:
            _check_sampling(run)
        in_batch = getattr(arguments, "method", "") == "in-batch"
        if model not in seen and not in_batch and Path(arguments.model_name) not in trained:
            check_model(*model)
        seen |= {places, model}


def _check_evaluation(run: Run, *, read: bool) -> None:
    """Check the output folder, and read the heads of the tables unless another run has the same ones."""
    from gen2embed_mteb.benchmarks import open_benchmark

    arguments, config = parsed(run), evaluation_config(run)
    _, check_folder, _, _ = open_benchmark(arguments.benchmark, arguments.data_dir, arguments.image_dir)
    check_folder(config)
    if not read:
        return
    if arguments.benchmark.startswith("sugarcrepe"):
        _read_captions(arguments.benchmark, config)
    elif arguments.benchmark.startswith("diverse"):
        return  # checked with its folder, and it opens images of its own
    elif arguments.benchmark.startswith("mmeb"):
        _read_mmeb(arguments.benchmark, config)
    image_source(config)


def _read_captions(benchmark: str, config: EvaluationConfig) -> None:
    from gen2embed_mteb.sugarcrepe.evaluate import (
        SUGARCREPE_BENCHMARK,
        SUGARCREPE_PLUS_BENCHMARK,
        read_records,
        set_file,
    )

    captions = SUGARCREPE_PLUS_BENCHMARK if "++" in benchmark else SUGARCREPE_BENCHMARK
    for name in captions.sets:
        read_records(set_file(Path(config.data_dir), captions, name), captions, limit=1)


def _read_mmeb(benchmark: str, config: EvaluationConfig) -> None:
    from gen2embed_mteb.mini.benchmark import MMEB_MINI
    from gen2embed_mteb.mmeb import MMEB
    from gen2embed_mteb.mmeb.readers import eval_columns
    from gen2embed_mteb.mmeb.tables import open_subsets

    datasets = (MMEB_MINI if benchmark == MMEB_MINI.name else MMEB).datasets
    for dataset, table in open_subsets(config.data_dir, datasets, config.split):
        table.require(eval_columns(dataset, table.columns))


def _check_sampling(run: Run) -> None:
    from trainers.data.training_data import open_training_data
    from trainers.sampling.config import SampleConfig
    from trainers.sampling.outputs import check_outputs

    config = from_flags(SampleConfig, parsed(run))
    data = open_training_data(config, config.images_cache)
    check_outputs(data, config)


def _check_training(run: Run) -> None:
    """Check the flags and the output folder; the sampling files may not be there yet."""
    from trainers.fine_tuning import parse
    from trainers.output.folder import check_output

    config, args = parse(run.words[1:], "gen2embed train")
    check_output(args.output_dir, {"processed_data_path": config.processed_data_path})
