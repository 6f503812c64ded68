"""The output folder of an evaluation, and the settings of its run, so that reports of two runs are never mixed.

`results.json` holds, as `settings`, all that decides the rows, the vectors and their scores. A later run with the same
settings adds its datasets; a run with other settings is refused, or, with `overwrite`, replaces all of the earlier
reports. The official score files hold only figures, so a reader who averages a folder of them could not notice files of
another run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gen2embed_mteb.bulk.store import EmbeddingStore, StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.evaluation.applied_calibration import comparison_settings
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import OwnedFolder

WRITER = "evaluate"
RESULTS = "results.json"
REPORTS = (RESULTS, "results.md", "errors.jsonl", "leaderboard.json")
SCORE_SUFFIX = "_score.json"
UNKNOWN = "not known yet"
"""The fingerprint in checks before the model is loaded."""

_PATHS = ("data_dir", "image_dir", "calibration")
_CHOICES = ("subsets", "meta_tasks")
"""The settings that choose datasets. Each dataset has its own score file, so runs on different ones fit together."""


def run_settings(config: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that decide the rows, how they are prepared and compared, for `results.json`.

    Args:
        config: The run's settings.

    Raises:
        FileNotFoundError: The calibrated folder that they name does not exist.
        Gen2EmbedError: It has no calibration, or is damaged.
    """
    limits = (field.name for field in dataclasses.fields(RowLimits))
    names = ("data_dir", "image_dir", "split", *_CHOICES, "limit", *limits, "follow_links", "resize", "min_side")
    values = {name: getattr(config, name) for name in names}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if config.plain_captions:
        listed["plain_captions"] = True
    return listed | config.orientation() | comparison_settings(config) | config.rerank_settings()


def check_reports(config: EvaluationConfig, benchmark: str, datasets: Iterable[str] = ()) -> None:
    """Refuse an output folder that this run may not write into; call it before a model is loaded.

    Args:
        config: The run's settings; a fingerprint of `UNKNOWN` is not compared.
        benchmark: The benchmark's name.
        datasets: The datasets that get a score file.

    Raises:
        ForeignFileError: The folder holds a report, a score file or a manifest of embeddings that we did not write.
        StoreMismatchError: The reports belong to another run, and `config.overwrite` is not set.
    """
    folder = OwnedFolder(config.output_dir, WRITER)
    folder.check([*REPORTS, *(f"{name}{SCORE_SUFFIX}" for name in datasets), *_score_files(folder)])
    EmbeddingStore.check(config.vectors_folder)
    differing = _differences(folder, config, benchmark)
    if differing and not config.overwrite:
        raise StoreMismatchError(
            f"{folder.path / RESULTS} is of another run ({'; '.join(differing)}), and figures of two runs must not be "
            "averaged; pass another --output_dir, or --overwrite to replace its reports"
        )


def begin_reports(config: EvaluationConfig, benchmark: str) -> OwnedFolder:
    """Return the folder for writing reports, after deleting those of another run; call it when all figures are known.

    Args:
        config: The run's settings.
        benchmark: The benchmark's name.

    Returns:
        The folder; write `results.json` into it last.

    Raises:
        ForeignFileError: One of the reports was changed since we wrote it.
    """
    folder = OwnedFolder(config.output_dir, WRITER)
    if not (folder.path / RESULTS).is_file() or _differences(folder, config, benchmark):
        # Delete `results.json` first: without it, files that remain after a kill are ignored and deleted next time.
        for name in (*REPORTS, *_score_files(folder)):
            folder.remove(name)
    return folder


def finished_run(config: EvaluationConfig, benchmark: str, datasets: Iterable[str]) -> dict[str, Any] | None:
    """Return the content of `results.json` if this run was made before; no model and no data is read.

    Args:
        config: The run's settings; a fingerprint of `UNKNOWN` is not compared.
        benchmark: The benchmark's name.
        datasets: The datasets that the run must have.

    Returns:
        The content, or None if the run is not finished, or if its results were changed since.

    Raises:
        StoreMismatchError: The results belong to another run, and `config.overwrite` is not set.
    """
    folder = OwnedFolder(config.output_dir, WRITER)
    if not folder.owns(RESULTS):
        return None
    content = dict(json.loads((folder.path / RESULTS).read_bytes()))
    different = differing(content, {"prompt_mode": config.prompt_mode}, ["prompt_mode"])
    different += _differences(folder, config, benchmark)
    if different and not config.overwrite:
        raise StoreMismatchError(
            f"{folder.path / RESULTS} is of another run ({'; '.join(different)}); pass another --output_dir, or "
            "--overwrite to replace it"
        )
    return content if not different and set(datasets) <= set(content["datasets"]) else None


def require_one_run(folder: Path) -> dict[str, Any]:
    """Return the content of `results.json`, after checking that all score files in the folder are of the same run.

    Args:
        folder: Any folder with score files.

    Returns:
        The content of `results.json`; empty if `gen2embed evaluate` wrote none.

    Raises:
        ForeignFileError: The folder holds score files of another run.
    """
    owned = OwnedFolder(folder, WRITER)
    scores = _score_files(owned)
    if not owned.owns(RESULTS):
        ours = [name for name in scores if owned.owns(name)]
        if ours:
            raise ForeignFileError(
                f"{folder / ours[0]} was left by a run of gen2embed evaluate that was killed while it wrote its "
                f"reports, or its {RESULTS} was changed; run it again"
            )
        return {}
    for name in scores:
        if not owned.owns(name):
            raise ForeignFileError(f"{folder / name} is not what the run of {RESULTS} beside it wrote: move it away")
    return dict(json.loads((folder / RESULTS).read_bytes()))


def _score_files(folder: OwnedFolder) -> list[str]:
    return sorted(path.name for path in folder.path.glob(f"*{SCORE_SUFFIX}"))


def _differences(folder: OwnedFolder, config: EvaluationConfig, benchmark: str) -> list[str]:
    """Return how the run that wrote the reports differs from this one; empty if there are no reports."""
    if not folder.owns(RESULTS):
        return []
    content = json.loads((folder.path / RESULTS).read_bytes())
    found = {**content["settings"], "benchmark": content["benchmark"], "fingerprint": content["fingerprint"]}
    settings = {**run_settings(config), "benchmark": benchmark, "fingerprint": config.fingerprint}
    # An option that is off is in neither.
    compared = [name for name in {**settings, **found} if name not in _CHOICES]
    return differing(found, settings, compared)


def differing(found: Mapping[str, Any], settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return how the settings of an earlier run differ from those of this one, for a message.

    Args:
        found: The earlier ones, with `fingerprint`.
        settings: Those of this run; a fingerprint of `UNKNOWN` is not compared.
        names: The names to compare.
    """
    return [
        f"{name} is {found.get(name)!r} there and {settings.get(name)!r} now"
        for name in names
        if (name, settings.get(name)) != ("fingerprint", UNKNOWN)
        and _comparable(name, found.get(name)) != _comparable(name, settings.get(name))
    ]


def _comparable(name: str, value: Any) -> Any:
    """Return a setting in a form in which two spellings of the same folder are equal."""
    return Path(value).expanduser().resolve() if name in _PATHS and value else value
