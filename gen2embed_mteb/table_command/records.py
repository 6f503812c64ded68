"""What the records of finished runs say: whether a run is finished, and which figures it gave.

An evaluation is finished if its `results.json` is unchanged, of the same settings, and has every dataset. A training is
finished if its `train.json` says so, of the same settings and sampling files; where it ran (processes, bfloat16) may
differ. A sampling is finished if the training that needs it is; otherwise `sample` itself finds what it finished.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run_folder import UNKNOWN, finished_run
from gen2embed_mteb.flags import from_flags
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.table_command.plans import OurRow, Run


def parsed(run: Run) -> argparse.Namespace:
    """Return the flags of a run, as its command parses them; those that `train` parses itself are in `rest`."""
    from gen2embed_mteb.cli import build_parser

    arguments, rest = build_parser(run.command).parse_known_args(list(run.words))
    arguments.rest = rest
    return arguments


def evaluation_config(run: Run) -> EvaluationConfig:
    """Return the settings of an evaluation, before its model is loaded.

    Args:
        run: The evaluation; data that a small benchmark draws is drawn, unless it is there.
    """
    from gen2embed_mteb.benchmarks import open_benchmark

    arguments = parsed(run)
    _, _, data_dir, image_dir = open_benchmark(arguments.benchmark, arguments.data_dir, arguments.image_dir)
    facts = {"prompt_mode": arguments.prompt_mode, "fingerprint": UNKNOWN}
    made: EvaluationConfig = from_flags(EvaluationConfig, arguments, data_dir=data_dir, image_dir=image_dir, **facts)
    return made


def finished_evaluation(run: Run) -> dict[str, Any] | None:
    """Return the content of an evaluation's `results.json`, or None if it is not finished.

    Raises:
        StoreMismatchError: Its folder holds another run, and `--overwrite` is not given.
    """
    if not run.folder.is_dir():
        return None
    config = evaluation_config(run)
    found = finished_run(config, *datasets_of(run))
    # Without a dataset of its own in the record, SugarCrepe may have been put into the folder after the run.
    return None if found and "sugarcrepe" not in found and _has_sugarcrepe(run, config) else found


def _has_sugarcrepe(run: Run, config: EvaluationConfig) -> bool:
    from gen2embed_mteb.retrieval.compositional import sugarcrepe_part

    return sugarcrepe_part(parsed(run).benchmark, config) is not None


def datasets_of(run: Run) -> tuple[str, tuple[str, ...]]:
    """Return the name that the benchmark of an evaluation has in `results.json`, and the names of its datasets.

    Args:
        run: The evaluation.

    Raises:
        DataError: The folder of a benchmark that runs what it finds holds nothing.
    """
    benchmark = parsed(run).benchmark
    if benchmark.startswith("diverse"):
        from gen2embed_mteb.retrieval.evaluate import chosen

        return benchmark, tuple(dataset.name for dataset in chosen(benchmark, evaluation_config(run)))
    if benchmark.startswith("sugarcrepe"):
        from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_BENCHMARK, SUGARCREPE_PLUS_BENCHMARK

        captions = SUGARCREPE_PLUS_BENCHMARK if "++" in benchmark else SUGARCREPE_BENCHMARK
        return captions.name, tuple(captions.sets)
    from gen2embed_mteb.mini.benchmark import MMEB_MINI
    from gen2embed_mteb.mmeb import MMEB

    found = MMEB_MINI if benchmark == MMEB_MINI.name else MMEB
    return found.name, found.names


def finished_training(run: Run) -> dict[str, Any] | None:
    """Return the content of a training's `train.json`, or None if it is not finished.

    Raises:
        Gen2EmbedError: Its folder holds another run.
    """
    if not OwnedFolder(run.folder, "train").owns("train.json"):
        return None
    from trainers.fine_tuning import finished_before, parse

    config, args = parse(run.words[1:], "gen2embed train")
    if not Path(config.processed_data_path).is_dir():
        return None
    return finished_before(config, args)


def is_finished(run: Run) -> bool:
    """Return whether an evaluation or a training is finished."""
    found = finished_evaluation(run) if run.command == "evaluate" else finished_training(run)
    return found is not None


def figures_of(row: OurRow) -> dict[str, float | None]:
    """Return the figures of a row from the records of its runs, in percent, hours in hours.

    Raises:
        Gen2EmbedError: One of its runs is not finished.
    """
    figures: dict[str, float | None] = {}
    for run in row.evaluations:
        figures |= result_figures(results_of(run))
    if row.training is not None:
        timing = json.loads((row.training.folder / "timing.json").read_bytes())
        figures["hours"] = timing["train_runtime"] / 3600
    return figures


def results_of(run: Run) -> dict[str, Any]:
    """Return the content of a finished evaluation's `results.json`.

    Raises:
        Gen2EmbedError: It is not finished.
    """
    results = finished_evaluation(run)
    if results is None:
        raise Gen2EmbedError(f"{run.folder}: the evaluation is not finished; run the same command again")
    return results


def result_figures(results: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the figures of a `results.json` by the keys of the published tables, in percent.

    Args:
        results: Its content, of MMEB, SugarCrepe or SugarCrepe++, or of a small benchmark of the same form.
    """
    if results["benchmark"].startswith("diverse"):
        recalls = {
            f"{name.removesuffix('-mini')}.{key}": _percent(one[direction]["recall_at_1"])
            for name, one in results["datasets"].items()
            for direction, key in (("text_to_image", "t2i"), ("image_to_text", "i2t"))
        }
        return recalls | _groups(results.get("sugarcrepe", {}))
    if results["benchmark"] == "sugarcrepe":
        return {"sugarcrepe": _percent(results["overall"]["accuracy_itt"]), **_groups(results)}
    if results["benchmark"] == "sugarcrepe++":
        sets = results["datasets"].items()
        return {f"{name}.{task}": _percent(one[f"accuracy_{task}"]) for name, one in sets for task in ("itt", "tot")}
    tasks = {task: one["precision_at_1"] for task, one in results["meta_tasks"].items()}
    known = [figure for figure in tasks.values() if figure is not None]
    averages = {name: results[name] for name in ("ind", "ood", "overall")}
    averages["mean_of_meta_tasks"] = sum(known) / len(known) if len(known) == len(tasks) and known else None
    return {name: _percent(figure) for name, figure in (tasks | averages).items()}


def set_aside(results: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows of an evaluation were set aside, and how many there were."""
    found = [*results["datasets"].values(), *results.get("sugarcrepe", {}).get("datasets", {}).values()]
    bad = sum(one["num_errors"] for one in found)
    scored = (one.get("num_queries", one.get("num_images", 0)) for one in found)
    return bad, bad + sum(scored)


def _groups(results: Mapping[str, Any]) -> dict[str, float | None]:
    return {f"sugarcrepe.{name.lower()}": _percent(one) for name, one in results.get("groups", {}).items()}


def _percent(figure: float | None) -> float | None:
    return None if figure is None else 100 * figure
