"""What is encoded of a row: its id, its text and its images; which columns hold them, and what a cell may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gen2embed_mteb.data_files.rows import RowFault, RowLimits, checked_path, checked_text
from gen2embed_mteb.data_files.shards import DataError

NONE = "none"
"""The word for a column that is not wanted."""
TEXT_NAMES = (
    *("text", "caption", "sentence", "content", "document", "passage", "body", "contents"),
    *("query", "question", "description", "abstract", "title"),
)
IMAGE_NAMES = ("image", "image_path", "img", "img_path", "picture", "photo", "file_name", "filename", "jpg", "png")
ID_NAMES = (
    *("id", "_id", "doc_id", "docid", "document_id", "passage_id", "query_id", "qid", "image_id"),
    *("uid", "uuid", "key", "__key__"),
)
"""The usual names of columns, the most telling ones first; letters count as equal to their capitals."""


class Columns(NamedTuple):
    """The columns that are read; an empty name stands for none."""

    text: str = ""
    image: str = ""
    id: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that there are, each once."""
        return tuple(dict.fromkeys(filter(None, self)))


@dataclass(frozen=True)
class Row:
    """A row that can be encoded.

    Attributes:
        index: Its number in the input, from 0.
        id: Its id; the number as text if it has none of its own.
        text: Its text; empty if it has none.
        images: Its images: paths, or the bytes of image files.
    """

    index: int
    id: str
    text: str
    images: tuple[str | bytes, ...]


def find_columns(available: Sequence[str], asked: Columns, source: str) -> Columns:
    """Find the columns of texts, images and ids.

    Args:
        available: The columns of the table.
        asked: The columns that the user named; `none` for one that is not wanted, empty for one that is to be found.
        source: The table, for messages.

    Returns:
        The columns; at least one of text and image.

    Raises:
        DataError: A column that was named is missing, or there is neither text nor image; the message lists the
            columns.
    """
    found = Columns(
        *(
            _column(available, name, usual, f"--{role}_column", source)
            for role, name, usual in zip(Columns._fields, asked, (TEXT_NAMES, IMAGE_NAMES, ID_NAMES), strict=True)
        )
    )
    if not found.text and not found.image:
        raise DataError(
            f"{source}: no column of texts or images is known by its name; it has {_listed(available)}. Name it with "
            "--text_column or --image_column"
        )
    if found.text == found.image:
        raise DataError(f"{source}: column {found.text!r} is named for texts and for images; name one of them")
    return found


def _column(available: Sequence[str], asked: str, usual: Sequence[str], flag: str, source: str) -> str:
    if asked == NONE and NONE not in available:
        return ""
    if asked and asked not in available:
        raise DataError(f"{source}: no column {asked!r}; it has {_listed(available)}. Correct {flag}")
    if asked:
        return asked
    by_name = {name.lower(): name for name in reversed(available)}
    return next((by_name[name] for name in usual if name in by_name), "")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return shown or "no columns"


def read_row(index: int, cells: Mapping[str, Any], columns: Columns, limits: RowLimits) -> Row:
    """Check the cells of a row, and return what is encoded.

    Args:
        index: The row's number.
        cells: Its cells by column.
        columns: The columns.
        limits: The largest accepted size of a row.

    Raises:
        RowFault: A cell holds something else, or there is neither text nor image.
    """
    text = ""
    images: tuple[str | bytes, ...] = ()
    if columns.text and (cell := cells[columns.text]) is not None:
        text = checked_text(cell, columns.text, limits)
    if columns.image:
        images = _images(cells[columns.image], columns.image, limits)
    if not text and not images:
        raise RowFault(f"{' and '.join(filter(None, columns[:2]))} is empty")
    return Row(index, _id(cells[columns.id], columns.id, limits) if columns.id else str(index), text, images)


def _id(cell: Any, column: str, limits: RowLimits) -> str:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return checked_text(cell, column, limits)


def _images(cell: Any, column: str, limits: RowLimits) -> tuple[str | bytes, ...]:
    """Return the images of a cell: one, a list of them, or none."""
    listed = cell if isinstance(cell, list | tuple) else [cell]
    if len(listed) > limits.max_candidates:
        raise RowFault(f"{column} has {len(listed)} entries, more than max_candidates {limits.max_candidates}")
    return tuple(_image(entry, column, limits) for entry in listed if entry is not None and entry != "")


def _image(entry: Any, column: str, limits: RowLimits) -> str | bytes:
    if isinstance(entry, dict):
        if unknown := sorted(str(key) for key in entry if key not in ("bytes", "path") and entry[key] is not None):
            raise RowFault(f'{column} has the unknown key {", ".join(unknown)}; an image is {{"bytes", "path"}}')
        entry = entry.get("bytes") or entry.get("path")
        if not entry:
            raise RowFault(f"{column} has neither bytes nor path")
    if isinstance(entry, bytes | bytearray):
        return bytes(entry)
    if not isinstance(entry, str):
        raise RowFault(f'{column} is {type(entry).__name__}, not a path, bytes or {{"bytes", "path"}}')
    return checked_path(entry, column, limits)
