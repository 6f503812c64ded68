"""Reads the texts of stage 1: single texts, or pairs of texts that stay in one batch.

The data is whatever `trainers/data` reads; beside two columns, a table may have one. A row with an image cannot be
used: a teacher of texts has no vector for it. Such rows, and all other faulty ones, are counted and left out.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.data_files.rows import BadRow
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.mmeb.readers import TrainRow
from trainers.data.config import PAIR_COLUMNS, DataConfig
from trainers.data.training_data import TrainingData

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence")
"""Names of a column that is taken for that of the texts, if none is named and there are no pairs."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(DataConfig):
    """Says which texts are read."""

    data_dir: str = option(
        "texts or pairs of texts: folder, file or hub id, or docstrings",
        needs="a folder, a file, a Hub id, or docstrings",
    )
    columns: tuple[str, ...] = option(
        "the column of the texts, or the two columns of pairs (default: anchor or query, and positive; else text or "
        "sentence)",
        default=(),
    )
    image_dir: str = option("not used here", default="", flag=None)
    image_columns: tuple[str, ...] = option("not used here", default=(), flag=None)
    follow_links: bool = option("not used here", default=False, flag=None)
    remote_images: tuple[str, ...] = option("not used here", default=(), flag=None)
    exif_orientation: bool = option("not used here", default=False, flag=None)
    pairs_only: bool = option("not used here", default=True, flag=None)
    max_error_rate: float = option("share of rejected rows above which nothing is trained", default=0.001)

    known_columns = "anchor (or query) and positive, nor text (or sentence)"
    name_columns = "Name one or two of them with --columns"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        check_options(self)
        if len(self.columns) > 2 or len(set(self.columns)) != len(self.columns):
            raise Gen2EmbedError(f"columns is {self.columns}; pass the name of the texts' column, or of a pair's two")

    def two_columns(self, present: Sequence[str]) -> tuple[str, str] | None:
        """Return the two columns of a pair, or twice the column of single texts; None if they are not there."""
        known = [*PAIR_COLUMNS, *((name, name) for name in TEXT_COLUMNS)]
        wanted = [(self.columns[0], self.columns[-1])] if self.columns else known
        return next((pair for pair in wanted if set(pair) <= set(present)), None)


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of stage 1.

    Attributes:
        distinct: The distinct texts, in the order in which they occur.
        rows: (n, width) int64, the texts of each row that can be used, as numbers in `distinct`.
        places: (len(distinct),) int64, where each text first occurs among the texts of all rows, row after row; rows
            that cannot be used count, too.
        num_places: How many texts all rows have, `width` for each row.
        rejected: The rows that cannot be used, with the reason.
    """

    distinct: list[str]
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    num_places: int
    rejected: list[BadRow]

    @property
    def width(self) -> int:
        """The number of texts in a row: 1, or 2 for pairs."""
        return int(self.rows.shape[1])

    @property
    def columns(self) -> list[str]:
        """The names of the columns of texts that a trainer gets."""
        return ["text"] if self.width == 1 else ["query", "positive"]

    def digest(self) -> str:
        """Return the SHA-256 of all rows, 64 hexadecimal digits."""
        found = hashlib.sha256(self.rows.tobytes())
        for text in self.distinct:
            found.update(f"{len(text)} {text}".encode())
        return found.hexdigest()


def read_texts(data: TrainingData, config: TextConfig) -> Texts:
    """Read all texts.

    Args:
        data: The opened data.
        config: What was opened; its `max_error_rate` is the share of rows that may be unusable.

    Raises:
        DataError: Too many rows cannot be used, none can, or some subsets have pairs and others single texts.
    """
    numbers: dict[str, int] = {}
    firsts: list[int] = []
    rows: list[tuple[int, ...]] = []
    rejected: list[BadRow] = []
    widths = {subset.name: _width(subset) for subset in data.subsets}
    width = next(iter(widths.values()))
    if len(set(widths.values())) > 1:
        single = [name for name, number in widths.items() if number == 1]
        raise DataError(
            f"{config.data_dir}: {single[0]} has single texts, other subsets have pairs; train on one kind (--subsets)"
        )
    place = 0
    for subset in data.subsets:
        for row in subset.rows():
            found = _usable(row, subset.source)
            if isinstance(found, BadRow):
                rejected.append(found)
            else:
                texts = (found.query.text, found.positive.text)[:width]
                for offset, text in enumerate(texts):
                    if numbers.setdefault(text, len(numbers)) == len(firsts):
                        firsts.append(place + offset)
                rows.append(tuple(numbers[text] for text in texts))
            place += width
    total = len(rows) + len(rejected)
    if not rows or len(rejected) > config.max_error_rate * total:
        first = f"; the first: {rejected[0].file}: {rejected[0].reason}" if rejected else ""
        raise DataError(
            f"{len(rejected)} of {total} rows cannot be used{first}; mend them, or raise --max_error_rate"
            if total
            else f"{config.data_dir}: there are no rows"
        )
    if rejected:
        logger.warning("%d of %d rows cannot be used; the first: %s", len(rejected), total, rejected[0].reason)
    return Texts(list(numbers), np.array(rows, dtype=np.int64), np.array(firsts, dtype=np.int64), place, rejected)


def _width(subset: object) -> int:
    columns = getattr(subset, "columns", None)
    return 1 if isinstance(columns, tuple) and columns[0] == columns[1] else 2


def _usable(row: TrainRow | BadRow, source: str) -> TrainRow | BadRow:
    if isinstance(row, BadRow):
        return row
    if row.query.images or row.positive.images:
        return BadRow(row.index, source, "it has an image, and stage 1 reads texts alone")
    if not row.query.text.strip() or not row.positive.text.strip():
        return BadRow(row.index, source, "a text of it is empty")
    return row
