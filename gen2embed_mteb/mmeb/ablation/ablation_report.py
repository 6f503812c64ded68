"""The files of `evaluate --ablation`: `ablation.json`, `ablation.md` and `ablation_errors.jsonl`.

The rows stand in the order in which they were asked for. None is marked as the best: these are figures of the test, and
whoever chooses by them has chosen on the test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import AblationOptions, EvaluationConfig
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.evaluation.method import COLUMNS
from gen2embed_mteb.evaluation.run import errors_bytes, installed_versions
from gen2embed_mteb.evaluation.run_folder import WRITER, differing, run_settings
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.mmeb.ablation.ablate import AblationResult, Combination
from gen2embed_mteb.mmeb.scoring import average, dataset_figures
from gen2embed_mteb.storage.owned_folder import OwnedFolder

JSON_FILE, MARKDOWN_FILE = "ablation.json", "ablation.md"
CHOOSING = (
    "These are figures of the test: choosing a row by them is choosing on the test. Choose on other data, or report "
    "every row."
)
TRANSDUCTIVE = (
    "Rows that say transductive: yes used inputs of the evaluation itself; compare them with each other only."
)


def ablation_settings(config: EvaluationConfig, options: AblationOptions) -> dict[str, Any]:
    """Return the settings that decide the rows of the table and their figures."""
    return {
        **run_settings(config),
        "ablation_prompts": [strategy(name).name for name in options.ablation_prompts],
        "ablation_readouts": [one.name for one in options.readouts],
        "ablation_data": options.ablation_data,
    }


def check_ablation_reports(config: EvaluationConfig, options: AblationOptions, benchmark: str) -> None:
    """Refuse an output folder that this run may not write into; call it before a model is loaded.

    Args:
        config: The run's settings; a fingerprint of `run_folder.UNKNOWN` is not compared.
        options: What is tabled.
        benchmark: The benchmark's name.

    Raises:
        ForeignFileError: The folder holds a file with the name of ours that we did not write.
        StoreMismatchError: The table there is of another run, and `config.overwrite` is not set.
    """
    folder = OwnedFolder(config.output_dir, WRITER)
    folder.check([JSON_FILE, MARKDOWN_FILE, AblationResult.errors_file])
    if config.overwrite or not folder.owns(JSON_FILE):
        return
    content = json.loads((folder.path / JSON_FILE).read_bytes())
    found = {**content["settings"], "benchmark": content["benchmark"], "fingerprint": content["fingerprint"]}
    settings = ablation_settings(config, options) | {"benchmark": benchmark, "fingerprint": config.fingerprint}
    different = differing(found, settings, {**settings, **found})
    if different:
        raise StoreMismatchError(
            f"{folder.path / JSON_FILE} is of another run ({'; '.join(different)}); pass another --output_dir, or "
            "--overwrite to replace it"
        )


def write_ablation(result: AblationResult, config: EvaluationConfig, options: AblationOptions) -> None:
    """Write all files into `config.output_dir`, each atomically, `ablation.json` last.

    Raises:
        ForeignFileError: An earlier file was changed since we wrote it.
    """
    folder = OwnedFolder(config.output_dir, WRITER)
    folder.remove(JSON_FILE)  # without it, files that remain after a kill are those of no run
    folder.write(AblationResult.errors_file, errors_bytes(list(result.errors)))
    folder.write(MARKDOWN_FILE, markdown(result, config).encode("utf-8", "backslashreplace"))
    folder.write_json(JSON_FILE, ablation_json(result, config, options))


def ablation_json(result: AblationResult, config: EvaluationConfig, options: AblationOptions) -> dict[str, Any]:
    """Build the content of `ablation.json`; figures in [0, 1]; the same run gives the same, except for `seconds`."""
    return {
        "model": config.model_name,
        "revision": config.revision,
        "benchmark": result.benchmark.name,
        "note": CHOOSING,
        "settings": ablation_settings(config, options),
        "left_out": dict(result.left_out),
        "combinations": [_combination_json(one) for one in result.combinations],
        "fingerprint": config.fingerprint,
        "versions": installed_versions(),
        "seconds": round(result.seconds, 3),
    }


def markdown(result: AblationResult, config: EvaluationConfig) -> str:
    """Build `ablation.md`; figures in percent."""
    title = f"# {result.benchmark.title}: {config.model_name or 'model'}, prompts, readouts and calibrations"
    return "\n\n".join([title, " ".join(_notes(result, config)), as_markdown(table(result))]) + "\n"


def text_table(result: AblationResult, config: EvaluationConfig) -> str:
    """Build the table and its notes for a terminal, without a newline at the end."""
    return "\n\n".join([as_text(table(result)), "\n".join(_notes(result, config))])


def table(result: AblationResult) -> Table:
    """Return one row per combination: the averages over all datasets, and how the figures were obtained."""
    rows: Table = [["prompt", "readout", "calibration", "scoring", "P@1", "strict", *COLUMNS]]
    for one in result.combinations:
        figures = (percent(average(one.scores, strict=strict).overall) for strict in (False, True))
        rows.append([one.prompt, one.readout.name, one.calibration, one.scoring, *figures, *one.method.cells()])
    return rows


def _notes(result: AblationResult, config: EvaluationConfig) -> list[str]:
    datasets = len(result.benchmark.datasets)
    notes = [
        f"Precision@1 in percent, mean of {datasets} dataset{'s' if datasets > 1 else ''}. strict: a tie with the "
        "positive does not count as a hit.",
        CHOOSING,
        TRANSDUCTIVE,
        *(f"Left out: {name} ({reason})." for name, reason in result.left_out.items()),
    ]
    if config.limit is not None:
        notes.append(f"Only the first {config.limit} rows of each dataset.")
    return notes


def _combination_json(one: Combination) -> Mapping[str, Any]:
    official, strict = average(one.scores), average(one.scores, strict=True)
    return {
        "prompt": one.prompt,
        "readout": one.readout.name,
        "calibration": one.calibration,
        "scoring": one.scoring,
        "method": one.method.to_json(),
        "overall": official.overall,
        "overall_strict": strict.overall,
        "ind": official.ind,
        "ood": official.ood,
        "meta_tasks": official.meta_tasks,
        "datasets": {score.dataset.name: dataset_figures(score) for score in one.scores},
    }
