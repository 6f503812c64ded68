"""The evaluation run on SugarCrepe and SugarCrepe++, which test whether vectors reflect small changes of a caption.

Sides are those of the official Gen2Embed code: captions are queries with the prefix `Find me an image that matches the
given caption: `, and images are candidates without text. UniME compares
captions without the prefix (`plain_captions`). Each distinct caption is encoded once, even if it occurs in
several comparisons.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Encoder, Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.rows import BadRow, RowFault, RowLimits, checked_path, checked_text, guarded, unique_keys
from gen2embed_mteb.data_files.shards import DataError, require_regular
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.evaluation.applied_calibration import refuse_comparison
from gen2embed_mteb.evaluation.run import (
    RowError,
    errors_bytes,
    image_source,
    is_first_process,
    open_bulk_encoder,
    refuse_images,
)
from gen2embed_mteb.evaluation.run_folder import RESULTS, begin_reports, check_reports
from gen2embed_mteb.evaluation.truncation import cut
from gen2embed_mteb.hub.addresses import local_place
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb.datasets import lookup
from gen2embed_mteb.sugarcrepe.report import markdown, results_json, text_table
from gen2embed_mteb.sugarcrepe.scoring import (
    SUGARCREPE_BENCHMARK,
    SUGARCREPE_PLUS_BENCHMARK,
    CaptionBenchmark,
    CompositionalityResult,
    SetScore,
    score_record,
)

__all__ = [
    "SUGARCREPE_BENCHMARK",
    "SUGARCREPE_PLUS_BENCHMARK",
    "CaptionBenchmark",
    "CompositionalityResult",
    "evaluate_captions",
    "text_table",
]

logger = logging.getLogger(__name__)

CAPTION_PREFIX = "Find me an image that matches the given caption: "
MAX_SET_BYTES = 256 * 2**20
"""The largest file of a set; the originals have less than a megabyte."""


def evaluate_captions(
    encoder: Encoder, benchmark: CaptionBenchmark, config: EvaluationConfig
) -> CompositionalityResult:
    """Run a compositionality benchmark and write its reports into `config.output_dir`.

    Args:
        encoder: The model.
        benchmark: `SUGARCREPE_BENCHMARK` or `SUGARCREPE_PLUS_BENCHMARK`.
        config: The run's settings; `data_dir` holds the JSON files, `image_dir` the COCO images that they name.

    Returns:
        The result; check its `too_many_errors`.

    Raises:
        DataError: A file is missing or not in the original form, or all records lack a field.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: The model takes text alone; every record has an image.
        ForeignFileError: The output folder holds files with the names of ours that we did not write.
        StoreMismatchError: The output folder belongs to another model, prompt or run.
        ValueError: A set is unknown, or the settings name meta-tasks, a calibration or another score.
    """
    start = time.monotonic()
    refuse_comparison(config, benchmark.title)
    if config.meta_tasks:
        raise Gen2EmbedError(
            f"{benchmark.title} has no meta-tasks; choose sets with --subsets {' '.join(benchmark.sets)}"
        )
    check_reports(config, benchmark.name)
    opened = open_sets(benchmark, config)
    refuse_images(getattr(encoder, "text_alone", ""), dict.fromkeys(opened.records, lambda: True))
    result = replace(score_sets(encoder, opened, config), seconds=time.monotonic() - start)
    errors, output_dir = list(result.errors), Path(config.output_dir)
    if is_first_process():
        reports = begin_reports(config, benchmark.name)
        reports.write("errors.jsonl", errors_bytes(errors))
        reports.write("results.md", markdown(result, config).encode("utf-8", "backslashreplace"))
        reports.write_json(RESULTS, results_json(result, config))
    if errors:
        logger.warning("%d records were set aside; see %s", len(errors), output_dir / "errors.jsonl")
    return result


@dataclass(frozen=True)
class OpenedSets:
    """Sets that were read, and their images.

    Attributes:
        benchmark: The benchmark.
        files: The file of each set.
        records: Its records, unchanged.
        images: The images that they name.
    """

    benchmark: CaptionBenchmark
    files: dict[str, Path]
    records: dict[str, list[Any]]
    images: ImageSource


def open_sets(benchmark: CaptionBenchmark, config: EvaluationConfig) -> OpenedSets:
    """Read the sets of a run; call it before a model encodes anything.

    Args:
        benchmark: The benchmark.
        config: The run's settings.

    Raises:
        DataError: A file is missing or not in the original form, or all records lack a field.
        FileNotFoundError: The images cannot be found.
        ValueError: A set is unknown.
    """
    aliases = {alias: name for name, file in benchmark.sets.items() for alias in (name, file)}
    wanted = {lookup(name, aliases, "set", benchmark.sets) for name in config.subsets} or set(benchmark.sets)
    names = [name for name in benchmark.sets if name in wanted]
    files = {name: set_file(local_place(config.data_dir), benchmark, name) for name in names}
    records = {name: read_records(files[name], benchmark, config.limit) for name in names}
    return OpenedSets(benchmark, files, records, image_source(config))


def score_sets(encoder: Encoder, opened: OpenedSets, config: EvaluationConfig) -> CompositionalityResult:
    """Encode and score sets; write no reports.

    Args:
        encoder: The model.
        opened: The sets.
        config: The run's settings.

    Raises:
        StoreMismatchError: The folder of the vectors belongs to another model or prompt.
    """
    start = time.monotonic()
    folder = config.vectors_folder
    bulk = open_bulk_encoder(encoder, config, opened.images, folder=folder, fingerprint=config.fingerprint)
    scores: list[SetScore] = []
    errors: list[RowError] = []
    for name, records in opened.records.items():
        score, rejected = _evaluate_set(bulk, opened.benchmark, name, (opened.files[name], records), config)
        scores.append(score)
        errors.extend(rejected)
        _warn_about_ties(score)
    return CompositionalityResult(
        benchmark=opened.benchmark,
        scores=tuple(scores),
        num_scored=sum(score.num_scored for score in scores),
        errors=tuple(errors),
        seconds=time.monotonic() - start,
        max_error_rate=config.max_error_rate,
    )


def set_file(data_dir: Path, benchmark: CaptionBenchmark, name: str) -> Path:
    """Find the file of one set.

    Args:
        data_dir: The folder that holds the files, or a clone of the original repository (files in `data`).
        benchmark: The benchmark.
        name: The set's name.

    Returns:
        The file.

    Raises:
        DataError: The file is missing.
    """
    names = dict.fromkeys((benchmark.sets[name], name))
    for folder in (data_dir.expanduser(), data_dir.expanduser() / "data"):
        for stem in names:
            if (folder / f"{stem}.json").is_file():
                return folder / f"{stem}.json"
    raise DataError(
        f"{data_dir}: no {benchmark.sets[name]}.json; pass the folder of {benchmark.title}'s JSON files as --data_dir, "
        "or leave the set out with --subsets"
    )


def read_records(path: Path, benchmark: CaptionBenchmark, limit: int | None = None) -> list[Any]:
    """Read the records of one set, in either of the original forms (a list, or a dict by running number).

    Args:
        path: The file.
        benchmark: The benchmark.
        limit: Keep only this many records from the beginning.

    Returns:
        The records, unchanged.

    Raises:
        DataError: The file does not have that form or is too large, or every record lacks a field.
    """
    size = require_regular(path).stat().st_size
    if size > MAX_SET_BYTES:
        raise DataError(f"{path}: {size} bytes are no set of {benchmark.title}; download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({one_line(error)}); download it again") from error
    records = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list or a dict of records; download {benchmark.title}'s original files")
    present = {key for record in records if isinstance(record, dict) for key in record}
    missing = [field for field in ("filename", *benchmark.captions) if field not in present]
    if missing:
        raise DataError(
            f"{path}: no field {', '.join(missing)}; it has {', '.join(sorted(present)) or 'no records'}. "
            f"Pass {benchmark.title}'s original files"
        )
    return records[:limit]


def record_items(
    record: Any, benchmark: CaptionBenchmark, limits: RowLimits | None = None, prefix: str = CAPTION_PREFIX
) -> tuple[Item, list[Item]]:
    """Return the image and the captions of a record as items.

    Args:
        record: The record from the file.
        benchmark: The benchmark.
        limits: The limits on the length of a text; None stands for the defaults.
        prefix: What stands before every caption.

    Raises:
        RowFault: The record cannot be used.
    """
    values: list[str] = []
    for field in ("filename", *benchmark.captions):
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, str) or not value:
            raise RowFault(f"{field} is missing, empty or not a string")
        values.append((checked_path if field == "filename" else checked_text)(value, field, limits or RowLimits()))
    return Item("", (values[0],)), [Item(prefix + caption) for caption in values[1:]]


def _evaluate_set(
    bulk: BulkEncoder, benchmark: CaptionBenchmark, name: str, source: tuple[Path, list[Any]], config: EvaluationConfig
) -> tuple[SetScore, list[RowError]]:
    path, records = source
    rows: list[tuple[int, Item, list[Item]]] = []
    rejected: list[RowError] = []

    def make(index: int, record: Any) -> tuple[int, Item, list[Item]]:
        prefix = "" if config.plain_captions else CAPTION_PREFIX
        return (index, *record_items(record, benchmark, config, prefix))

    for row in guarded(records, lambda _: str(path), make):
        if isinstance(row, BadRow):
            rejected.append(RowError(name, row.index, row.file, row.reason))
        else:
            rows.append(row)
    bulk.add("query", [caption for _, _, captions in rows for caption in captions], f"{name} captions")
    bulk.add("document", [image for _, image, _ in rows], f"{name} images")
    hits: dict[str, list[bool]] = {task: [] for task in benchmark.tasks}
    ties: dict[str, list[bool]] = {task: [] for task in benchmark.tasks}
    for index, image, captions in rows:
        faults = [bulk.fault("document", image), *(bulk.fault("query", caption) for caption in captions)]
        fault = next((found for found in faults if found), None)
        if fault:
            rejected.append(RowError(name, index, fault.file or str(path), fault.reason))
            continue
        of_image, of_captions = (bulk.vectors(*what) for what in (("document", [image]), ("query", captions)))
        outcomes = score_record(cut(of_image, config.truncate_dim)[0], cut(of_captions, config.truncate_dim))
        for task, (hit, tie) in zip(benchmark.tasks, outcomes, strict=True):
            hits[task].append(hit)
            ties[task].append(tie)
    rejected.sort(key=lambda error: error.row)
    return SetScore(name, hits, ties, len(rejected)), rejected


def _warn_about_ties(score: SetScore) -> None:
    for task, flags in score.ties.items():
        if any(flags):
            logger.warning(
                "%s, %s: %d of %d records are ties, which count as wrong; check the model if there are many",
                score.name,
                task.upper(),
                sum(flags),
                len(flags),
            )
