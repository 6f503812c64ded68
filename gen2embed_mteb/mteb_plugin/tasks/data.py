"""Converting a table of MMEB's form to the corpus, queries and candidate lists of a retrieval task of mteb.

Each distinct input has one id: a candidate of a thousand rows is one document. A query's candidates keep the file's
order, with candidate 0, the positive, first. Images are opened when mteb reads a row, by our rules (formats, sizes,
nothing outside of the folder, no rotation by EXIF), from a folder or from MMEB's zip archive.

Cost: one pass over the table; every distinct image is opened once as a check, as mteb cannot set a row aside later.
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
from datasets.features.features import _FEATURE_TYPES
from PIL import Image
from tqdm import tqdm

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import EncodingConfig
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.readers import BadRow, eval_columns, read_eval_rows
from gen2embed_mteb.mmeb.tables import DataError, SubsetTable
from gen2embed_mteb.mteb_plugin.tasks.task_metadata import CATEGORIES

logger = logging.getLogger(__name__)

OPENERS = 4  # the number of threads that check images


@dataclass
class SourcedImage(datasets.Image):
    """A column of image paths, whose images are opened through an `ImageSource`.

    Attributes:
        source: The folder or zip archive that the paths are relative to.
    """

    source: str = ""
    _type: str = field(default="SourcedImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Image.Image:
        """Open one image as RGB.

        Raises:
            ImageError: The image cannot be used.
        """
        return open_source(self.source).open(value["path"])


# When a table is read again (by `map` or a worker process), the class is found by its name. `datasets` has a function
# that registers it in the same way, but it would show a warning to everyone who imports mteb.
_FEATURE_TYPES["SourcedImage"] = SourcedImage


@lru_cache(maxsize=4)
def open_source(path: str) -> ImageSource:
    """Return the images at a path, opened once per process."""
    return ImageSource(path, follow_links=follows_links())


def retrieval_split(table: SubsetTable, dataset: DatasetInfo, images: ImageSource) -> tuple[dict[str, Any], int]:
    """Read a table as the data of a retrieval task.

    Args:
        table: The dataset's table.
        dataset: The dataset.
        images: The source of its images.

    Returns:
        mteb's `RetrievalSplitData` (`corpus`, `queries`, `relevant_docs`, `top_ranked`), and the number of rows that
        were set aside, as `gen2embed evaluate` does: each is logged with its reason.

    Raises:
        DataError: A column is missing, no row is usable, more than 0.1 % of the rows were set aside, or a side has
            images although the dataset's form has none there.
    """
    table.require(eval_columns(dataset, table.columns))
    documents: dict[Item, str] = {}
    rows: dict[int, _Row] = {}
    rejected: dict[int, str] = {}
    for row in read_eval_rows(table, dataset):
        if isinstance(row, BadRow):
            rejected[row.index] = row.reason
        else:
            names = [documents.setdefault(item, f"d{len(documents)}") for item in row.candidates]
            # A candidate that a row lists twice counts once, at its first position.
            rows[row.index] = _Row(row.query, list(dict.fromkeys(names)))
    items = (*documents, *(row.query for row in rows.values()))
    faults = image_faults({path for item in items for path in item.images}, images)
    faulty = {name: reason for item, name in documents.items() if (reason := fault_of(item, faults))}
    for index, planned in rows.items():
        bad = [faulty[name] for name in planned.candidates if name in faulty]
        if fault := fault_of(planned.query, faults) or next(iter(bad), ""):
            rejected[index] = fault
    for index, reason in sorted(rejected.items()):
        logger.warning("%s: row %d was set aside: %s", dataset.name, index, reason)
    kept = {f"q{index}": row for index, row in rows.items() if index not in rejected}
    check_error_rate(table.source, len(rejected), len(rejected) + len(kept))
    used = {name for row in kept.values() for name in row.candidates}
    corpus = [(name, item) for item, name in documents.items() if name in used]
    query_kinds, document_kinds = CATEGORIES[dataset.form].split("2")
    split = {
        "queries": items_table([(name, row.query) for name, row in kept.items()], query_kinds, images, table.source),
        "corpus": items_table(corpus, document_kinds, images, table.source),
        "relevant_docs": {name: {row.candidates[0]: 1} for name, row in kept.items()},
        "top_ranked": {name: row.candidates for name, row in kept.items()},
    }
    return split, len(rejected)


class _Row(NamedTuple):
    """A row whose candidates are ids, to save memory: a dataset of MMEB lists a million, mostly repeated."""

    query: Item
    candidates: list[str]


def check_error_rate(source: str, num_errors: int, num_rows: int) -> None:
    """Refuse data with too many unusable rows, since mteb cannot report their number beside a score.

    Args:
        source: The file, for the message.
        num_errors: The number of rows that were set aside.
        num_rows: The number of all rows.

    Raises:
        DataError: More rows were set aside than `gen2embed evaluate` allows by default, or all rows.
    """
    if num_errors == num_rows or num_errors > EncodingConfig.max_error_rate * num_rows:
        raise DataError(
            f"{source}: {num_errors} of {num_rows} rows cannot be used, the log says why; mend the data, or score the "
            "rest with `gen2embed evaluate --max_error_rate`"
        )


def items_table(named: list[tuple[str, Item]], kinds: str, images: ImageSource, source: str) -> datasets.Dataset:
    """Return a dataset with the columns `id`, `text` and, if the side has images, `image`."""
    columns: dict[str, list[Any]] = {"id": [name for name, _ in named], "text": [item.text for _, item in named]}
    features = {"id": datasets.Value("string"), "text": datasets.Value("string")}
    if "i" in kinds:
        columns["image"] = [item.images[0] if item.images else None for _, item in named]
        features["image"] = SourcedImage(source=str(images.path))
    elif any(item.images for _, item in named):
        raise DataError(
            f"{source}: images where this dataset has text only; pass data of the dataset it is named after"
        )
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def image_faults(paths: set[str], images: ImageSource) -> dict[str, str]:
    """Open every image once and return the faults by path; mteb cannot set a row aside later."""

    def fault(path: str) -> str:
        try:
            fitted_size(images.open(path).size, ImageOptions(), path)
        except ImageError as error:
            return str(error)
        return ""

    ordered = sorted(paths)
    with ThreadPoolExecutor(OPENERS, thread_name_prefix="check") as pool:
        found = tqdm(
            pool.map(fault, ordered),
            total=len(ordered),
            desc="checking images",
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        return {path: reason for path, reason in zip(ordered, found, strict=True) if reason}


def fault_of(item: Item, faults: dict[str, str]) -> str:
    """Return the fault of the first image of an item that has one; empty if all can be used."""
    return next((faults[path] for path in item.images if path in faults), "")
