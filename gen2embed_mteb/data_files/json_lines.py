"""Reading a table with one JSON object per line; a line that cannot be used is replaced by a `RowFault`.

Cost: one pass, in bounded memory: a line that is longer than the limit is skipped in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.data_files.rows import RowFault, RowLimits, unique_keys
from gen2embed_mteb.data_files.shards import DataError, require_regular
from gen2embed_mteb.errors import one_line

_PIECE = 2**20
_LINES_FOR_COLUMNS = 1000


class LineStart(NamedTuple):
    """The beginning of a line: its first byte, from 0, and its number, from 1."""

    byte: int
    line: int


@dataclass(frozen=True)
class JsonLines:
    """A table with one JSON object per line; empty lines do not count as rows.

    Attributes:
        path: The file, UTF-8.
    """

    path: Path

    @property
    def source(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The names that occur in the first thousand lines; none if there are no rows."""
        lines = islice(self._lines(RowLimits()), _LINES_FOR_COLUMNS)
        return tuple(dict.fromkeys(name for line in lines if isinstance(line, dict) for name in line))

    def require_rows(self) -> None:
        """Check that there are rows, and that one of the first thousand is an object.

        Raises:
            DataError: There are none; the message names what is wrong with the first line.
        """
        if not self.columns:
            first = next(self._lines(RowLimits()), None)
            what = "the table has no rows" if first is None else "its objects are empty"
            what = first.reason if isinstance(first, RowFault) else what
            raise DataError(f"{self.path}: {what}; write one JSON object a line")

    def file_of(self, row: int) -> str:
        """Return the file that holds a row."""
        return str(self.path)

    def rows(
        self, columns: Sequence[str], limit: int | None = None, limits: RowLimits | None = None
    ) -> Iterator[dict[str, Any] | RowFault]:
        """Read rows in order.

        Args:
            columns: The names to read; a name that a line lacks has the value None.
            limit: Stop after this many rows.
            limits: The largest accepted size of a row; None stands for the defaults.

        Yields:
            One dict per line, or its fault.

        Raises:
            DataError: The file is not a regular file.
        """
        for line in islice(self._lines(limits or RowLimits()), limit):
            yield line if isinstance(line, RowFault) else {column: line.get(column) for column in columns}

    def rows_at(
        self, columns: Sequence[str], limits: RowLimits, first: LineStart, stop: int
    ) -> Iterator[dict[str, Any] | RowFault]:
        """Read the rows of a range of bytes.

        Args:
            columns: As for `rows`.
            limits: The largest accepted size of a row.
            first: The beginning of the first row, from `line_starts`.
            stop: The byte behind the last row.

        Yields:
            As for `rows`.
        """
        for line in self._lines(limits, first, stop):
            yield line if isinstance(line, RowFault) else {column: line.get(column) for column in columns}

    def line_starts(self, limits: RowLimits) -> Iterator[LineStart]:
        """Find where each row begins; nothing is parsed.

        Args:
            limits: The largest accepted size of a row, as for `rows`.

        Yields:
            The beginning of each row, in order.

        Raises:
            DataError: The file is not a regular file.
        """
        with require_regular(self.path).open("rb") as file:
            start = number = 0
            while piece := file.readline(_PIECE):
                number += 1
                length, filled = len(piece), bool(piece.strip())
                while not piece.endswith(b"\n") and (piece := file.readline(_PIECE)):
                    length, filled = length + len(piece), filled or bool(piece.strip())
                if filled or length > limits.max_row_bytes:
                    yield LineStart(start, number)
                start += length

    def _lines(
        self, limits: RowLimits, first: LineStart | None = None, stop: int | None = None
    ) -> Iterator[dict[str, Any] | RowFault]:
        with require_regular(self.path).open("rb") as file:
            number = 0
            if first is not None:
                file.seek(first.byte)
                number = first.line - 1
            while (stop is None or file.tell() < stop) and (line := file.readline(limits.max_row_bytes + 1)):
                number += 1
                if len(line) > limits.max_row_bytes:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_PIECE)
                    yield RowFault(f"line {number}: more than max_row_bytes {limits.max_row_bytes}")
                elif line.strip():
                    yield _parsed(line, number)


def _parsed(line: bytes, number: int) -> dict[str, Any] | RowFault:
    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=unique_keys)
    except RecursionError:
        return RowFault(f"line {number}: no JSON that can be read (nested too deeply)")
    except ValueError as error:
        return RowFault(f"line {number}: no JSON ({one_line(error)})")
    if not isinstance(value, dict):
        return RowFault(f"line {number}: not an object; one row a line is expected")
    return value
