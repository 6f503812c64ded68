"""The input of `gen2embed encode`: a folder of pictures or a table, cut into parts by the order of its rows alone.

A part is a plain description: where its rows are. Any process that sees the same input reads the same rows from it, and
no process holds more than one part's rows. `opening.py` finds out what the input is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from gen2embed_mteb.data_files.rows import BadRow, RowFault, RowLimits, guarded
from gen2embed_mteb.data_files.shards import is_utf8
from gen2embed_mteb.encode_command.options import JSONL, PARQUET, PICTURES
from gen2embed_mteb.encode_command.rows import Columns, Row

PICTURE_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
TABLE_ENDINGS = {".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}
ROWS_LOOKED_AT = 10_000
"""An input is refused if none of this many rows at its beginning can be used."""


class Part(NamedTuple):
    """A part of an input; it can be sent to another process or host that sees the same input.

    Attributes:
        number: Its number, from 0.
        first_row: The number of its first row in the input.
        num_rows: The number of its rows, faulty ones included.
        place: Where they are, as the source needs it.
    """

    number: int
    first_row: int
    num_rows: int
    place: tuple[Any, ...]


class Source(Protocol):
    """An input; it can be pickled."""

    @property
    def kind(self) -> str:
        """What it is, such as `jsonl`."""

    @property
    def source(self) -> str:
        """The file, folder or Hub id, for messages."""

    @property
    def columns(self) -> Columns:
        """The columns that are read; of pictures none."""

    @property
    def num_rows(self) -> int:
        """The number of rows, faulty ones included."""

    @property
    def image_root(self) -> Path | None:
        """The folder or archive of images that are paths; None if there are none."""

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order, each of `size` rows but the last."""

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Read the rows of a part in order."""


def table_files(folder: Path, kind: str = "") -> list[Path]:
    """Return the tables in a folder, sorted by name.

    Args:
        folder: The folder; its subfolders are not searched.
        kind: `jsonl` or `parquet`; empty for both.
    """
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and not path.is_dir()]
    kinds = {path: TABLE_ENDINGS.get(path.suffix.lower()) for path in files}
    return [path for path in files if kinds[path] and kind in ("", kinds[path])]


def cut(num_rows: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first row and end of each part of a table."""
    for number, start in enumerate(range(0, num_rows, size)):
        yield number, start, min(num_rows, start + size)


@dataclass(frozen=True)
class Pictures:
    """The pictures below a folder, by the order of their paths; hidden files and folders are left out.

    Attributes:
        root: The folder. Links to folders are not followed.
        limit: The number of pictures to read; None: all.
    """

    root: Path
    limit: int | None = None

    @property
    def kind(self) -> str:
        """What it is."""
        return PICTURES

    @property
    def source(self) -> str:
        """The folder, for messages."""
        return str(self.root)

    @property
    def columns(self) -> Columns:
        """None: a picture's id is its path."""
        return Columns()

    @cached_property
    def num_rows(self) -> int:
        """The number of pictures."""
        return sum(1 for _ in self._paths())

    @property
    def image_root(self) -> Path:
        """The folder."""
        return self.root

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order; one listing of a folder is held at a time."""
        paths, first, number = self._paths(), 0, 0
        while chunk := tuple(islice(paths, size)):
            yield Part(number, first, len(chunk), chunk)
            first, number = first + len(chunk), number + 1

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Yield a row per picture, whose id is its path relative to the folder."""

        def make(index: int, path: str) -> Row:
            if not is_utf8(path):
                raise RowFault(
                    "its name is no Unicode text; rename it", path.encode("utf-8", "backslashreplace").decode()
                )
            return Row(part.first_row + index, path, "", (path,))

        for row in guarded(part.place, lambda index: str(part.place[index]), make):
            yield row if isinstance(row, Row) else BadRow(part.first_row + row.index, row.file, row.reason)

    def _paths(self) -> Iterator[str]:
        return islice(walk(self.root), self.limit)


def walk(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the paths of pictures relative to a folder, in the order of the paths as texts."""
    with os.scandir(folder) as entries:
        found = [
            entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")
            for entry in entries
            if not entry.name.startswith(".")
        ]
    for name in sorted(found):
        if name.endswith("/"):
            yield from walk(folder / name, prefix + name)
        elif PurePosixPath(name).suffix.lower() in PICTURE_ENDINGS:
            yield prefix + name
