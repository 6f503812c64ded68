"""The report on finished runs: the leaderboard's file, and tables with the paper's figures.

VLM2Vec writes one `{S}_score.json` per dataset: v1 writes only the accuracy, V2 hits, nDCG and more at 1, 5 and 10. The
leaderboard requires V2's form. For v1 it gets only the figures at 1, which all equal the accuracy if each row has one
relevant candidate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.method import Method
from gen2embed_mteb.evaluation.run_folder import WRITER as EVALUATE
from gen2embed_mteb.evaluation.run_folder import require_one_run
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.report import LEADERBOARD_METADATA, averages_table, leaderboard_entry, methods_beside
from gen2embed_mteb.mmeb.scoring import RANKING_METRICS, average_figures
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from vlm2vec_adapter.datasets import known_datasets
from vlm2vec_adapter.results.output import WRITER, read_record

OTHER_MODALITIES = {"video": "hit@1", "visdoc": "ndcg_linear@5"}
"""V2's other modalities besides images, with the figure that its leaderboard averages."""

MODALITIES = ("image", *OTHER_MODALITIES)
"""All modalities. V2's shell scripts give each its own folder; a folder without such subfolders holds images."""

SUFFIX = "_score.json"
ENTRY, PAGE = "leaderboard.json", "report.md"


@dataclass(frozen=True)
class Run:
    """The content of one output folder.

    Attributes:
        folder: The folder.
        generation: "v1" or "v2".
        metrics: The figures in V2's form, by modality and dataset.
        record: The record that `output.read_record` found; empty if there is none.
    """

    folder: Path
    generation: str
    metrics: dict[str, dict[str, dict[str, Any]]]
    record: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings with which the vectors were made."""
        settings: Mapping[str, Any] = self.record.get("settings", {})
        return settings

    @property
    def label(self) -> str:
        """The name of the run in tables."""
        name = self.settings.get("adapter") or self.settings.get("model") or self.folder.name
        return f"{self.generation}: {Path(str(name)).name}"

    @property
    def method(self) -> Method:
        """How its figures were obtained: one forward pass per query, or what `gen2embed evaluate` recorded."""
        stated = require_one_run(self.folder).get("method")
        return Method.from_json(stated) if stated else Method(Path(str(self.settings.get("model") or "–")).name)

    @property
    def figures(self) -> dict[str, float]:
        """Precision@1 of the datasets of images, by name."""
        return {name: float(scores["hit@1"]) for name, scores in self.metrics.get("image", {}).items()}


def read_run(folder: Path) -> Run:
    """Read the scores of an output folder.

    Args:
        folder: `--encode_output_path`, or the folder above `image`, `video` and `visdoc`.

    Raises:
        ValueError: There are no scores, a file was not written by VLM2Vec, or the files belong to two runs.
    """
    found = {name: folder / name for name in MODALITIES if any((folder / name).glob(f"*{SUFFIX}"))}
    found = found or {"image": folder}
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    generation = "v2"
    for modality, place in found.items():
        require_one_run(place)
        for path in sorted(place.glob(f"*{SUFFIX}")):
            scores = _read_scores(path)
            if "acc" in scores:
                generation, scores = "v1", _in_v2_form(scores)
            metrics.setdefault(modality, {})[path.name.removesuffix(SUFFIX)] = scores
    if not metrics:
        raise Gen2EmbedError(f"{folder} holds no *{SUFFIX}; pass the --encode_output_path of a finished run")
    return Run(folder, generation, metrics, read_record(next(iter(found.values()))) or {})


def leaderboard_json(run: Run, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry for the MMEB leaderboard.

    Args:
        run: The run.
        metadata: Facts that the run does not contain, by the leaderboard's names.

    Raises:
        ValueError: The leaderboard does not have such a name.
    """
    unknown = sorted(set(metadata) - set(LEADERBOARD_METADATA))
    if unknown:
        raise Gen2EmbedError(f"unknown metadata {', '.join(unknown)}; known: {', '.join(LEADERBOARD_METADATA)}")
    name = run.settings.get("adapter") or run.settings.get("model")
    known = {"model_name": name, **run.record.get("model", {})}
    return leaderboard_entry({**known, **metadata}, run.metrics)


def tables(runs: Sequence[Run]) -> list[Table]:
    """Return tables of the datasets of MMEB, of the averages and published ones, how these were obtained, and of V2's
    other modalities.

    Args:
        runs: Runs of either generation; each is a column in the tables of datasets, and a row in that of averages.

    Returns:
        The tables that are not empty, with figures in percent.
    """
    labels = [run.label for run in runs]
    known = known_datasets()
    present = {name for run in runs for name in run.figures}
    names = [name for name in known if name in present]
    found: list[Table] = []
    if names:
        rows = [[name, known[name].meta_task, "IND" if known[name].in_domain else "OOD"] for name in names]
        cells = [[percent(run.figures.get(name)) for run in runs] for name in names]
        found.append([["dataset", "meta-task", "domain", *labels], *map(list.__add__, rows, cells)])
        averages = [
            (run.label, average_figures([(known[name], run.figures.get(name)) for name in names])) for run in runs
        ]
        mode = str(runs[0].settings.get("prompt_mode", "hierarchical"))
        found.append(averages_table(averages, mode))
        found.append(methods_beside([(run.label, run.method) for run in runs], mode))
    for modality, metric in OTHER_MODALITIES.items():
        others = sorted({name for run in runs for name in run.metrics.get(modality, {})})
        if others:
            scores = [run.metrics.get(modality, {}) for run in runs]
            rows = [[name, *(percent(of_run.get(name, {}).get(metric)) for of_run in scores)] for name in others]
            found.append([[f"{modality}, {metric}", *labels], *rows])
    return found


def write(folders: Sequence[Path], metadata: Mapping[str, str]) -> str:
    """Write `leaderboard.json` into every folder, `report.md` into the first.

    Args:
        folders: The folders of finished runs, of either generation.
        metadata: Facts for the leaderboard.

    Returns:
        The tables for a terminal.

    Raises:
        ForeignFileError: A file of that name was not written by `report`, or was changed since.
        ValueError: A folder has no scores, or the metadata has an unknown name.
    """
    # A folder of `gen2embed evaluate` already has an entry of the same form, but only for its last run.
    owned = [OwnedFolder(folder, EVALUATE if require_one_run(folder) else WRITER) for folder in folders]
    page_folder = OwnedFolder(folders[0], WRITER)
    for folder in owned:
        folder.check([ENTRY])
    page_folder.check([PAGE])
    runs = [read_run(folder) for folder in folders]
    entries = [leaderboard_json(run, metadata) for run in runs]
    found = tables(runs)
    notes = list(dict.fromkeys(note for run in runs for note in _notes(run)))
    if len({frozenset(run.figures) for run in runs}) > 1:
        counts = ", ".join(f"{run.label} of {len(run.figures)}" for run in runs)
        notes.insert(0, f"The runs hold different datasets; averages are over each run's own: {counts}.")
    written = [folder.write_json(ENTRY, entry) for folder, entry in zip(owned, entries, strict=True)]
    page = ["# VLM2Vec's evaluation of Gen2Embed", "Precision@1 in percent, where nothing else is said.", *notes]
    page += [as_markdown(table) for table in found]
    written.append(page_folder.write(PAGE, ("\n\n".join(page) + "\n").encode()))
    return "\n\n".join([*map(as_text, found), *notes, f"Written: {', '.join(map(str, written))}"])


def _notes(run: Run) -> list[str]:
    """Return notes that a reader of the averages needs."""
    notes = []
    limit = require_one_run(run.folder).get("settings", {}).get("limit")
    if limit is not None:
        notes.append(f"{run.label}: only the first {limit} rows of each dataset.")
    outside = [name for name in run.figures if name not in known_datasets()]
    if outside:
        notes.append(f"{run.label}: not of MMEB, left out of the averages: {', '.join(outside)}.")
    present = [dataset for dataset in MMEB.datasets if run.figures.keys() & set(dataset.folders)]
    if not present and run.figures:
        notes.append("The paper's rows are of MMEB itself; compare their order, not the figures.")
    elif 0 < len(present) < len(MMEB.datasets):
        notes.append(
            f"{run.label}: {len(present)} of MMEB's {len(MMEB.datasets)} datasets; the paper's rows are of all."
        )
    return notes


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise Gen2EmbedError("no regular file")
        scores = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Gen2EmbedError(
            f"{path} cannot be read ({error}); move it away and run VLM2Vec's evaluation again"
        ) from error
    if not isinstance(scores, dict) or not scores.keys() & {"acc", "hit@1"}:
        raise Gen2EmbedError(f"{path} has neither `acc` (v1) nor `hit@1` (V2): VLM2Vec did not write it")
    for name, value in scores.items():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise Gen2EmbedError(f"{path}: {name} is no number: VLM2Vec did not write it")
    accuracy = scores["acc"] if "acc" in scores else scores["hit@1"]
    if accuracy is None or not 0 <= accuracy <= 1:
        raise Gen2EmbedError(f"{path}: its accuracy is not between 0 and 1: VLM2Vec did not write it")
    return scores


def _in_v2_form(scores: Mapping[str, Any]) -> dict[str, Any]:
    number = scores.get("num_pred")
    return {**{f"{name}@1": scores["acc"] for name in RANKING_METRICS}, "num_pred": number, "num_data": number}
