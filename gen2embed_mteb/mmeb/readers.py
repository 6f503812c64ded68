"""Reading MMEB rows: evaluation data (V1 and V2 columns) and training pairs.

A row that cannot be used (no candidates, lists of different lengths, a null) does not raise an exception but becomes a
`BadRow`: it is counted with its reason and set aside, and the run goes on (`data_files/rows.py`). A fault of a whole
file (`tables.py`) is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.rows import BadRow, RowFault, RowLimits, checked_path, checked_text, guarded
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.row_text import compose_candidates, compose_query, drop_unmatched_markers
from gen2embed_mteb.mmeb.tables import SubsetTable

__all__ = [
    "NEGATIVE_COLUMNS",
    "TRAIN_COLUMNS",
    "BadRow",
    "EvalRow",
    "TrainRow",
    "eval_columns",
    "read_eval_rows",
    "read_train_rows",
]


@dataclass(frozen=True)
class EvalRow:
    """One query with its own candidates; candidate 0 is the positive.

    Attributes:
        index: The row's number in its split, from 0.
        query: The query.
        candidates: At least one candidate, in the file's order.
    """

    index: int
    query: Item
    candidates: tuple[Item, ...]


@dataclass(frozen=True)
class TrainRow:
    """One training pair, with the negative that some subsets contain; data of one's own may have more of both.

    Attributes:
        index: The row's number in its split, from 0.
        query: The query.
        positive: Its positive candidate.
        negative: A hard negative of MMEB-train, or None.
        more_positives: Its further positives.
        negatives: Its explicit negatives; none of them is one of its positives.
    """

    index: int
    query: Item
    positive: Item
    negative: Item | None
    more_positives: tuple[Item, ...] = ()
    negatives: tuple[Item, ...] = ()

    @property
    def positives(self) -> tuple[Item, ...]:
        """All positives."""
        return (self.positive, *self.more_positives)


def eval_columns(dataset: DatasetInfo, available: tuple[str, ...]) -> tuple[str, ...]:
    """Return the columns that are read from evaluation data.

    Args:
        dataset: The dataset.
        available: The columns that the file has; only V2 has a column `qry_inst`.

    Returns:
        The columns that this form needs. In V2 a form without query images needs no `qry_img_path`, and a form whose
        candidates are plain text needs neither `tgt_inst` nor `tgt_img_path`.
    """
    if "qry_inst" not in available:
        return ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    if dataset.form in ("label", "question"):
        return ("qry_inst", "qry_text", "qry_img_path", "tgt_text")
    if dataset.form in ("text-to-image", "dialogue-to-image"):
        return ("qry_inst", "qry_text", "tgt_inst", "tgt_text", "tgt_img_path")
    return ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")


def read_eval_rows(
    table: SubsetTable, dataset: DatasetInfo, limit: int | None = None, limits: RowLimits | None = None
) -> Iterator[EvalRow | BadRow]:
    """Read evaluation rows, V1 or V2.

    Args:
        table: The dataset's table.
        dataset: The dataset.
        limit: Stop after this many rows.
        limits: The largest accepted size of a row; None stands for the defaults.

    Yields:
        One `EvalRow` or `BadRow` per row, in order.

    Raises:
        DataError: A column is missing, or a file is damaged.
    """
    columns = eval_columns(dataset, table.columns)
    reader = _Reader(limits or RowLimits())

    def make(index: int, row: Mapping[str, Any]) -> EvalRow:
        query, candidates = reader.v2(row, dataset) if "qry_inst" in columns else reader.v1(row)
        return EvalRow(index, query, candidates)

    yield from guarded(table.rows(columns, limit, limits), table.file_of, make)


TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


def read_train_rows(
    table: SubsetTable, limit: int | None = None, limits: RowLimits | None = None
) -> Iterator[TrainRow | BadRow]:
    """Read training pairs (splits `original` and `diverse_instruction`).

    Args:
        table: The subset's table.
        limit: Stop after this many rows.
        limits: The largest accepted size of a row; None stands for the defaults.

    Yields:
        One `TrainRow` or `BadRow` per row, in order.

    Raises:
        DataError: A column is missing, or a file is damaged. The columns of the negative may be missing together.
    """
    columns = TRAIN_COLUMNS + NEGATIVE_COLUMNS if _has_negatives(table) else TRAIN_COLUMNS
    reader = _Reader(limits or RowLimits())
    yield from guarded(table.rows(columns, limit, limits), table.file_of, reader.train)


def _has_negatives(table: SubsetTable) -> bool:
    return all(column in table.columns for column in NEGATIVE_COLUMNS)


@dataclass(frozen=True)
class _Reader:
    """Builds items from the columns of a row; raises `RowFault` for a faulty row."""

    limits: RowLimits

    def train(self, index: int, row: Mapping[str, Any]) -> TrainRow:
        query = self._item(row["qry"], row["qry_image_path"], "qry")
        positive = self._item(row["pos_text"], row["pos_image_path"], "pos")
        for side, item in (("query", query), ("positive", positive)):
            if not item.text and not item.images:
                raise RowFault(f"the {side} has neither text nor image")
        # A missing negative is stored as nulls or as empty strings, depending on the subset.
        text, image = (row.get(column) or "" for column in NEGATIVE_COLUMNS)
        return TrainRow(index, query, positive, self._item(text, image, "neg") if text or image else None)

    def v1(self, row: Mapping[str, Any]) -> tuple[Item, tuple[Item, ...]]:
        query = self._item(row["qry_text"], row["qry_img_path"], "qry")
        texts, paths = self._strings(row["tgt_text"], "tgt_text"), self._strings(row["tgt_img_path"], "tgt_img_path")
        return query, self._items(texts, paths)

    def v2(self, row: Mapping[str, Any], dataset: DatasetInfo) -> tuple[Item, tuple[Item, ...]]:
        parts = (checked_text(row[column], column, self.limits) for column in ("qry_inst", "qry_text"))
        query = self._item(compose_query(dataset.form, *parts), row.get("qry_img_path", ""), "qry")
        texts = self._strings(row["tgt_text"], "tgt_text")
        # An instruction column may be null if there is no instruction.
        instruction = checked_text(row.get("tgt_inst") or "", "tgt_inst", self.limits)
        # Every candidate gets the instruction, so a long instruction and a long list multiply.
        if len(instruction) * len(texts) > self.limits.max_row_bytes:
            raise RowFault(
                f"with tgt_inst before each candidate the row has more than max_row_bytes {self.limits.max_row_bytes}"
            )
        composed = compose_candidates(dataset.form, instruction, texts)
        paths = self._strings(row["tgt_img_path"], "tgt_img_path") if "tgt_img_path" in row else [""] * len(texts)
        return query, self._items(composed, paths)

    def _strings(self, value: Any, column: str) -> list[str]:
        if not isinstance(value, list):
            raise RowFault(f"{column} is {'null' if value is None else type(value).__name__}, not a list")
        if len(value) > self.limits.max_candidates:
            raise RowFault(f"{column} has {len(value)} entries, more than max_candidates {self.limits.max_candidates}")
        return [checked_text(entry, f"{column}[{position}]", self.limits) for position, entry in enumerate(value)]

    def _item(self, text: Any, image: Any, column: str) -> Item:
        """Check a text and an image path, and return them as an item; an empty path means no image."""
        path = checked_path(image, f"image path of {column}", self.limits)
        images = (path,) if path else ()
        return Item(drop_unmatched_markers(checked_text(text, f"text of {column}", self.limits), len(images)), images)

    def _items(self, texts: list[str], paths: list[str]) -> tuple[Item, ...]:
        if not texts:
            raise RowFault("the candidate list is empty")
        if len(texts) != len(paths):
            raise RowFault(f"{len(texts)} candidate texts but {len(paths)} candidate image paths")
        return tuple(self._item(text, path, "tgt") for text, path in zip(texts, paths, strict=True))
