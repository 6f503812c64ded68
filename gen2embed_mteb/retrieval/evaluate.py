"""The evaluation run on images with captions, in both directions.

A caption that searches an image is a query without instruction, and the image a candidate without text; and the other
way round. Each distinct caption and image is encoded once per side.

1. Read the rows of every dataset, and refuse what cannot be used, before anything is encoded.
2. For each dataset, encode what is new, rank in both directions (`directions.py`), and set rejected rows aside.
3. Write the reports, even if too many rows were rejected; the result tells the caller.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.config import OWN, EvaluationConfig
from gen2embed_mteb.data_files.rows import BadRow, guarded
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.applied_calibration import stored_map
from gen2embed_mteb.evaluation.run import RowError, errors_bytes, is_first_process, open_bulk_encoder, refuse_images
from gen2embed_mteb.evaluation.run_folder import RESULTS, begin_reports, check_reports
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.mmeb.datasets import lookup
from gen2embed_mteb.names import Side
from gen2embed_mteb.retrieval.compositional import DIVERSE, SUGARCREPE, sugarcrepe_part
from gen2embed_mteb.retrieval.datasets import (
    DATASETS,
    CaptionDataset,
    CaptionedImage,
    OpenedDataset,
    is_there,
    open_dataset,
)
from gen2embed_mteb.retrieval.directions import caption_items, image_item, ranks_both_ways, require_own_inputs
from gen2embed_mteb.retrieval.report import markdown, results_json, text_table
from gen2embed_mteb.retrieval.scoring import DatasetRecall, RetrievalResult
from gen2embed_mteb.sugarcrepe.evaluate import open_sets, score_sets
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_BENCHMARK

__all__ = ["chosen", "evaluate_retrieval", "text_table"]

logger = logging.getLogger(__name__)

IMAGES_CACHE = "images-cache"
"""The folder, beside the vectors, into which images are written that are embedded in tables."""
MINI = "diverse-mini"
_SIDES: tuple[Side, Side] = ("query", "document")


def chosen(name: str, config: EvaluationConfig) -> list[CaptionDataset]:
    """Return the datasets of a benchmark.

    Args:
        name: The name of a dataset; `diverse`, those that `data_dir` holds; or `diverse-mini`, the same of drawn ones.
        config: The run's settings, which may name datasets.

    Returns:
        The datasets of images with captions; SugarCrepe is none of them (see `compositional`).

    Raises:
        DataError: The folder holds none of them.
        Gen2EmbedError: A dataset is unknown, or the settings name meta-tasks.
    """
    if config.meta_tasks:
        raise Gen2EmbedError(f"{name} has no meta-tasks; leave --meta_task out")
    known = {dataset.name: dataset for dataset in DATASETS}
    if name in known:
        if set(config.subsets) - {name}:
            raise Gen2EmbedError(f"--subsets {' '.join(config.subsets)}: {name} is one dataset; leave it out")
        return [known[name]]
    names = [*known, *([SUGARCREPE] if name == DIVERSE else [])]
    wanted = {lookup(one, {key: key for key in names}, "dataset", names) for one in config.subsets} - {SUGARCREPE}
    found = [dataset for dataset in DATASETS if is_there(dataset, config.data_dir)]
    missing = wanted - {dataset.name for dataset in found}
    captions = sugarcrepe_part(name, config)
    if missing or not (found or captions):
        places = ", ".join("/".join(dataset.folders) for dataset in DATASETS)
        raise DataError(
            f"{config.data_dir}: no {', '.join(sorted(missing)) or 'dataset'}; put them into folders of these names: "
            f"{places}"
        )
    used = [dataset for dataset in found if not config.subsets or dataset.name in wanted]
    if name != MINI:
        return used
    return [replace(dataset, name=f"{dataset.name}-mini", title=f"{dataset.title}-mini") for dataset in used]


def evaluate_retrieval(encoder: Encoder, name: str, config: EvaluationConfig) -> RetrievalResult:
    """Run a retrieval benchmark and write its reports into `config.output_dir`.

    Args:
        encoder: The model.
        name: See `chosen`.
        config: The run's settings.

    Returns:
        The result; check its `too_many_errors`.

    Raises:
        DataError: A dataset is missing or not in its published layout, or none of its rows can be used.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: The model takes text alone; or the settings ask for a calibration that cannot be read, that does
            not fit the vectors, or that is fitted on a dataset's own inputs, of which there are too few.
        ForeignFileError: The output folder holds files with the names of ours that we did not write.
        StoreMismatchError: The output folder belongs to another model, prompt or run.
    """
    start = time.monotonic()
    datasets = chosen(name, config)
    check_reports(config, name)
    stored = stored_map(config)
    refuse_images(getattr(encoder, "text_alone", ""), {name: lambda: True})
    links: dict[str, Any] = {
        "follow_links": config.follow_links or follows_links(),
        "exif_orientation": config.exif_orientation,
        "remote_images": config.remote_images,
    }
    cache = config.vectors_folder / IMAGES_CACHE
    read = [
        _read(open_dataset(dataset, config.data_dir, config.image_dir, cache, **links), config) for dataset in datasets
    ]
    part = sugarcrepe_part(name, config)
    sets = open_sets(SUGARCREPE_BENCHMARK, part) if part else None
    scores: list[DatasetRecall] = []
    errors: list[RowError] = []
    for one in read:
        bulk = open_bulk_encoder(
            encoder,
            config,
            one.opened.images,
            folder=config.vectors_folder / one.opened.dataset.name,
            fingerprint=config.fingerprint,
        )
        score, rejected = _evaluate_dataset(bulk, one, config, stored)
        scores.append(score)
        errors.extend(rejected)
    captions = score_sets(encoder, sets, part) if part and sets else None
    errors.extend(captions.errors if captions else ())
    result = RetrievalResult(
        name=name,
        scores=tuple(scores),
        captions=captions,
        num_scored=sum(score.num_images for score in scores) + (captions.num_scored if captions else 0),
        errors=tuple(errors),
        seconds=time.monotonic() - start,
        max_error_rate=config.max_error_rate,
    )
    if is_first_process():
        reports = begin_reports(config, name)
        reports.write("errors.jsonl", errors_bytes(errors))
        reports.write("results.md", markdown(result, config).encode("utf-8", "backslashreplace"))
        reports.write_json(RESULTS, results_json(result, config))
    if errors:
        logger.warning("%d rows were set aside; see %s", len(errors), Path(config.output_dir) / "errors.jsonl")
    return result


@dataclass(frozen=True)
class _Read:
    """A dataset whose rows were read: those that can be used, and the others."""

    opened: OpenedDataset
    rows: list[CaptionedImage]
    rejected: list[RowError]


def _read(opened: OpenedDataset, config: EvaluationConfig) -> _Read:
    name = opened.dataset.name
    rows: list[CaptionedImage] = []
    rejected: list[RowError] = []

    def make(index: int, numbered: tuple[int, object]) -> CaptionedImage:
        return opened.made(*numbered, config)

    for row in guarded(opened.rows(config.limit), lambda _: opened.source, make):
        if isinstance(row, BadRow):
            rejected.append(RowError(name, row.index, row.file, row.reason))
        else:
            rows.append(row)
    if not rows:
        _refuse(opened, rejected)
    if config.calibration == OWN:
        require_own_inputs(name, rows)
    return _Read(opened, rows, rejected)


def _refuse(opened: OpenedDataset, rejected: list[RowError]) -> NoReturn:
    reason = f"the first fault is {rejected[0].reason}" if rejected else "it has none"
    raise DataError(f"{opened.source}: no row can be used; {reason}")


def _evaluate_dataset(
    bulk: BulkEncoder, read: _Read, config: EvaluationConfig, stored: AffineMap | None
) -> tuple[DatasetRecall, list[RowError]]:
    name = read.opened.dataset.name
    rejected = list(read.rejected)
    for side in _SIDES:
        bulk.add(side, [image_item(row) for row in read.rows], f"{name} images, {side}")
        bulk.add(side, [item for row in read.rows for item in caption_items(row)], f"{name} captions, {side}")
    kept: list[CaptionedImage] = []
    for row in read.rows:
        items = [image_item(row), *caption_items(row)]
        fault = next((found for side in _SIDES for item in items if (found := bulk.fault(side, item))), None)
        if fault:
            rejected.append(RowError(name, row.index, fault.file or row.file, fault.reason))
        else:
            kept.append(row)
    rejected.sort(key=lambda error: error.row)
    if not kept:
        _refuse(read.opened, rejected)
    ranks, used = ranks_both_ways(name, bulk, kept, config, stored)
    return DatasetRecall(
        read.opened.dataset,
        ranks,
        num_images=len(kept),
        num_captions=sum(len(row.captions) for row in kept),
        num_errors=len(rejected),
        num_unlabelled=used,
    ), rejected
