"""Checking rows of data: a faulty row is counted and set aside with its reason, and the run goes on.

1. A reader (Parquet, JSON lines, JSON records) yields one value per row: the row, or a `RowFault` if it cannot be read.
2. `guarded` converts each row. Faults of reading and of converting become `BadRow`s, which keep the row's number, the
   file and the reason. A fault of a whole file is an error, not a `BadRow`.

`guarded` serves MMEB's evaluation rows, training pairs, tables of two columns and caption files. It makes one pass, and
holds one row at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.flags import check_options, option

T = TypeVar("T")
MAX_PATH_CHARS = 4096
"""The longest path that Linux accepts."""
_DATA_CAN_RAISE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""The errors that faulty data can cause. Errors of the system (`OSError`, `MemoryError`) are not a fault of a row."""


class RowFault(Gen2EmbedError):
    """The fault of one row.

    Attributes:
        reason: The fault, in one line.
        file: The file at fault, if the reader knows it.
    """

    def __init__(self, reason: str, file: str = "") -> None:
        """Keep the reason as one printable line."""
        self.reason = shortened(reason)
        self.file = file
        super().__init__(self.reason)


@dataclass(frozen=True)
class BadRow:
    """A row that was set aside.

    Attributes:
        index: The row's number in its split, from 0.
        file: The file at fault, if there is one.
        reason: The fault, in one line.
    """

    index: int
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """The largest accepted size of a row; a larger row is set aside. The defaults are far above all known data."""

    max_text_chars: int = option(
        "longest text of a row, in characters; a row beyond it is set aside", default=1_000_000, least=1
    )
    max_candidates: int = option(
        "most entries of a list in a row (MMEB has 1,000); a row beyond it is set aside", default=100_000, least=1
    )
    max_row_bytes: int = option(
        "largest row in bytes, embedded images included; a row beyond it is set aside", default=64 * 2**20, least=1
    )

    def __post_init__(self) -> None:
        """Check every limit.

        Raises:
            Gen2EmbedError: A limit is below 1.
        """
        check_options(self)

    def row_limits(self) -> dict[str, int]:
        """Return the three limits by name."""
        return {name: getattr(self, name) for name in ("max_text_chars", "max_candidates", "max_row_bytes")}


def guarded(rows: Iterable[Any], file_of: Callable[[int], str], make: Callable[[int, Any], T]) -> Iterator[T | BadRow]:
    """Convert rows with `make`, and faulty rows to a `BadRow`.

    Args:
        rows: The rows in order; a `RowFault` in place of a row that cannot be read.
        file_of: Returns the file of a row by its number, for faults that do not name a file.
        make: Converts a row, given its number and the row; raises `RowFault`, or any error that faulty data causes.

    Yields:
        The return value of `make`, or a `BadRow`; one per row, in order.
    """
    for index, row in enumerate(rows):
        made: T | BadRow
        try:
            if isinstance(row, RowFault):
                raise row
            made = make(index, row)
        except RowFault as fault:
            made = BadRow(index, fault.file or file_of(index), fault.reason)
        except Gen2EmbedError as error:
            made = BadRow(index, file_of(index), shortened(str(error)))
        except _DATA_CAN_RAISE as error:
            made = BadRow(index, file_of(index), shortened(f"{type(error).__name__}: {error}"))
        yield made


def checked_text(value: Any, name: str, limits: RowLimits) -> str:
    """Check a text of a row, and return it unchanged.

    Args:
        value: The value in the row.
        name: The name of the value in the reason.
        limits: The limits on its length.

    Raises:
        RowFault: It is not a string, is too long, or holds a lone surrogate, which no tokenizer or file can take.
    """
    if not isinstance(value, str):
        raise RowFault(f"{name} is {'null' if value is None else type(value).__name__}, not a string")
    if len(value) > limits.max_text_chars:
        raise RowFault(f"{name} has {len(value)} characters, more than max_text_chars {limits.max_text_chars}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowFault(
                f"{name} is no Unicode text: lone surrogate \\u{ord(value[error.start]):04x} at character {error.start}"
            ) from None
    return value


def checked_path(value: Any, name: str, limits: RowLimits) -> str:
    """Check the path of an image, and return it unchanged; see `checked_text`.

    Args:
        value: The value in the row.
        name: The name of the value in the reason.
        limits: The limits on the length of a text.

    Raises:
        RowFault: As for `checked_text`, or the text is longer than any path, such as an image in a data URI.
    """
    if isinstance(value, str) and len(value) > MAX_PATH_CHARS:
        raise RowFault(f"{name} has {len(value)} characters, so it is no path; write the image into a file")
    return checked_text(value, name, limits)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, for `object_pairs_hook`; without it `json` keeps the last of two equal keys.

    Args:
        pairs: Keys and values.

    Raises:
        RowFault: A key is there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowFault(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return made


def shortened(text: str) -> str:
    """Return a reason as one printable line of at most 500 characters, since errors may quote a whole text."""
    line = one_line(ValueError(text[:5000]))
    return line if len(line) <= 500 else line[:499] + "…"
