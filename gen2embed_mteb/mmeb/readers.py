"""Reading MMEB rows: evaluation data (V1 and V2 columns) and training pairs.

A row that cannot be used (no candidates, lists of different lengths, a null) is not an exception but a `BadRow`: it is
counted with its reason and set aside, and the run goes on. What is wrong with a whole file (`tables.py`) is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.encoder import Item
from gen2embed_mteb.mmeb.composition import compose_candidates, compose_query, drop_unmatched_markers
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.tables import SubsetTable


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
    """One training pair, with the negative that some subsets ship.

    Attributes:
        index: The row's number in its split, from 0.
        query: The query.
        positive: Its positive candidate.
        negative: A hard negative, or None.
    """

    index: int
    query: Item
    positive: Item
    negative: Item | None


@dataclass(frozen=True)
class BadRow:
    """A row that was set aside.

    Attributes:
        index: The row's number in its split, from 0.
        file: The file at fault, where one is.
        reason: The fault, one line.
    """

    index: int
    file: str
    reason: str


def eval_columns(dataset: DatasetInfo, available: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that are read from evaluation data.

    Args:
        dataset: The dataset.
        available: The columns that the file has; a column `qry_inst` tells V2 from V1.

    Returns:
        All that the composition of this form uses: in V2 a form without query images needs no `qry_img_path`, and
        one whose candidates are plain text needs neither `tgt_inst` nor `tgt_img_path`.
    """
    if "qry_inst" not in available:
        return ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    if dataset.form in ("label", "question"):
        return ("qry_inst", "qry_text", "qry_img_path", "tgt_text")
    if dataset.form in ("text-to-image", "dialogue-to-image"):
        return ("qry_inst", "qry_text", "tgt_inst", "tgt_text", "tgt_img_path")
    return ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")


def read_eval_rows(table: SubsetTable, dataset: DatasetInfo, limit: int | None = None) -> Iterator[EvalRow | BadRow]:
    """Reads evaluation rows, V1 or V2.

    Args:
        table: The dataset's table.
        dataset: Its record.
        limit: Stop after this many rows.

    Yields:
        One `EvalRow` or `BadRow` a row, in order.

    Raises:
        DataError: A column is missing.
    """
    columns = eval_columns(dataset, table.columns)
    for index, row in enumerate(table.rows(columns, limit)):
        try:
            query, candidates = _eval_row_v2(row, dataset) if "qry_inst" in columns else _eval_row_v1(row)
            yield EvalRow(index, query, candidates)
        except _RowFault as fault:
            yield BadRow(index, table.source, str(fault))


TRAIN_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")


def read_train_rows(table: SubsetTable, limit: int | None = None) -> Iterator[TrainRow | BadRow]:
    """Reads training pairs (splits `original` and `diverse_instruction`).

    Args:
        table: The subset's table.
        limit: Stop after this many rows.

    Yields:
        One `TrainRow` or `BadRow` a row, in order.

    Raises:
        DataError: A column is missing. The columns of the negative may be missing together.
    """
    with_negative = all(column in table.columns for column in NEGATIVE_COLUMNS)
    columns = TRAIN_COLUMNS + NEGATIVE_COLUMNS if with_negative else TRAIN_COLUMNS
    for index, row in enumerate(table.rows(columns, limit)):
        try:
            query = _item(row["qry"], row["qry_image_path"], "qry")
            positive = _item(row["pos_text"], row["pos_image_path"], "pos")
            for side, item in (("query", query), ("positive", positive)):
                if not item.text and not item.images:
                    raise _RowFault(f"the {side} has neither text nor image")
            # No negative is written as nulls or as empty strings, depending on the subset.
            text, image = (row[column] or "" for column in NEGATIVE_COLUMNS) if with_negative else ("", "")
            negative = _item(text, image, "neg") if text or image else None
            yield TrainRow(index, query, positive, negative)
        except _RowFault as fault:
            yield BadRow(index, table.source, str(fault))


class _RowFault(ValueError):
    """What is wrong with the row at hand."""


def _string(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise _RowFault(f"{column} is {'null' if value is None else type(value).__name__}, not a string")
    return value


def _strings(value: Any, column: str) -> list[str]:
    if not isinstance(value, list):
        raise _RowFault(f"{column} is {'null' if value is None else type(value).__name__}, not a list")
    return [_string(entry, f"{column}[{position}]") for position, entry in enumerate(value)]


def _item(text: Any, image: Any, column: str) -> Item:
    """Checks one (text, image path) pair; an empty path means no image."""
    path = _string(image, f"image path of {column}")
    images = (path,) if path else ()
    return Item(drop_unmatched_markers(_string(text, f"text of {column}"), len(images)), images)


def _items(texts: list[str], paths: list[str]) -> tuple[Item, ...]:
    if not texts:
        raise _RowFault("the candidate list is empty")
    if len(texts) != len(paths):
        raise _RowFault(f"{len(texts)} candidate texts but {len(paths)} candidate image paths")
    return tuple(_item(text, path, "tgt") for text, path in zip(texts, paths, strict=True))


def _eval_row_v1(row: Mapping[str, Any]) -> tuple[Item, tuple[Item, ...]]:
    query = _item(row["qry_text"], row["qry_img_path"], "qry")
    return query, _items(_strings(row["tgt_text"], "tgt_text"), _strings(row["tgt_img_path"], "tgt_img_path"))


def _eval_row_v2(row: Mapping[str, Any], dataset: DatasetInfo) -> tuple[Item, tuple[Item, ...]]:
    query_text = compose_query(dataset.form, _string(row["qry_inst"], "qry_inst"), _string(row["qry_text"], "qry_text"))
    query = _item(query_text, row.get("qry_img_path", ""), "qry")
    texts = _strings(row["tgt_text"], "tgt_text")
    # An instruction column may be null where there is nothing to instruct.
    composed = compose_candidates(dataset.form, _string(row.get("tgt_inst") or "", "tgt_inst"), texts)
    paths = _strings(row["tgt_img_path"], "tgt_img_path") if "tgt_img_path" in row else [""] * len(texts)
    return query, _items(composed, paths)
