"""The evaluation run on images with captions, in both directions.

A caption that searches an image is a query without instruction, and the image a candidate without text; and the other
way round. Each distinct caption and image is encoded once per side.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Encoder, Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.rows import BadRow, guarded
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.applied_calibration import refuse_comparison
from gen2embed_mteb.evaluation.run import RowError, errors_bytes, is_first_process, open_bulk_encoder, refuse_images
from gen2embed_mteb.evaluation.run_folder import RESULTS, begin_reports, check_reports
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.mmeb.datasets import lookup
from gen2embed_mteb.names import Side
from gen2embed_mteb.retrieval.datasets import (
    DATASETS,
    CaptionDataset,
    CaptionedImage,
    OpenedDataset,
    is_there,
    open_dataset,
)
from gen2embed_mteb.retrieval.report import markdown, results_json, text_table
from gen2embed_mteb.retrieval.scoring import DIRECTIONS, DatasetRecall, RetrievalResult, ranks_of

__all__ = ["chosen", "evaluate_retrieval", "text_table"]

logger = logging.getLogger(__name__)

IMAGES_CACHE = "images-cache"
"""The folder in the output folder into which images are written that are embedded in tables."""
MINI = "diverse-mini"
_SIDES: tuple[Side, Side] = ("query", "document")


def chosen(name: str, config: EvaluationConfig) -> list[CaptionDataset]:
    """Return the datasets of a benchmark.

    Args:
        name: The name of a dataset; `diverse`, those that `data_dir` holds; or `diverse-mini`, the same of drawn ones.
        config: The run's settings, which may name datasets.

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
    wanted = {lookup(one, {key: key for key in known}, "dataset", known) for one in config.subsets}
    found = [dataset for dataset in DATASETS if is_there(dataset, config.data_dir)]
    missing = wanted - {dataset.name for dataset in found}
    if missing or not found:
        places = ", ".join("/".join(dataset.folders) for dataset in DATASETS)
        raise DataError(
            f"{config.data_dir}: no {', '.join(sorted(missing)) or 'dataset'}; put them into folders of these names: "
            f"{places}"
        )
    used = [dataset for dataset in found if not wanted or dataset.name in wanted]
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
        DataError: A dataset is missing or not in its published layout.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: The model takes text alone, or the settings name a calibration or another score.
        ForeignFileError: The output folder holds files with the names of ours that we did not write.
        StoreMismatchError: The output folder belongs to another model, prompt or run.
    """
    start = time.monotonic()
    refuse_comparison(config, name)
    datasets = chosen(name, config)
    check_reports(config, name)
    refuse_images(getattr(encoder, "text_alone", ""), {dataset.name: lambda: True for dataset in datasets})
    links = {
        "follow_links": config.follow_links or follows_links(),
        "exif_orientation": config.exif_orientation,
    }
    cache = Path(config.output_dir) / IMAGES_CACHE
    opened = [open_dataset(dataset, config.data_dir, config.image_dir, cache, **links) for dataset in datasets]
    scores: list[DatasetRecall] = []
    errors: list[RowError] = []
    for one in opened:
        bulk = open_bulk_encoder(
            encoder,
            config,
            one.images,
            folder=config.vectors_folder / one.dataset.name,
            fingerprint=config.fingerprint,
        )
        score, rejected = _evaluate_dataset(bulk, one, config)
        scores.append(score)
        errors.extend(rejected)
    result = RetrievalResult(
        name=name,
        scores=tuple(scores),
        num_scored=sum(score.num_images for score in scores),
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


def _evaluate_dataset(
    bulk: BulkEncoder, opened: OpenedDataset, config: EvaluationConfig
) -> tuple[DatasetRecall, list[RowError]]:
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
    for side in _SIDES:
        bulk.add(side, [_image(row) for row in rows], f"{name} images, {side}")
        bulk.add(side, [Item(caption) for row in rows for caption in row.captions], f"{name} captions, {side}")
    kept: list[CaptionedImage] = []
    for row in rows:
        items = [_image(row), *(Item(caption) for caption in row.captions)]
        fault = next((found for side in _SIDES for item in items if (found := bulk.fault(side, item))), None)
        if fault:
            rejected.append(RowError(name, row.index, fault.file or row.file, fault.reason))
        else:
            kept.append(row)
    rejected.sort(key=lambda error: error.row)
    if not kept:
        raise DataError(f"{opened.source}: no row can be used; the first fault is {rejected[0].reason}")
    return DatasetRecall(
        opened.dataset,
        _ranks(bulk, kept),
        num_images=len(kept),
        num_captions=sum(len(row.captions) for row in kept),
        num_errors=len(rejected),
    ), rejected


def _ranks(bulk: BulkEncoder, rows: Sequence[CaptionedImage]) -> dict:
    images = [_image(row) for row in rows]
    captions = [Item(caption) for row in rows for caption in row.captions]
    of_images = np.arange(len(rows), dtype=np.int64)
    of_captions = np.repeat(of_images, [len(row.captions) for row in rows])
    return {
        DIRECTIONS[0]: ranks_of(
            bulk.vectors("query", captions), bulk.vectors("document", images), of_captions, of_images
        ),
        DIRECTIONS[1]: ranks_of(
            bulk.vectors("query", images), bulk.vectors("document", captions), of_images, of_captions
        ),
    }


def _image(row: CaptionedImage) -> Item:
    return Item("", (row.image,))
