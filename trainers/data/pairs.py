"""A query and its positive in two columns of a table, read row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.rows import BadRow, RowFault, RowLimits, checked_path, checked_text, guarded
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.evaluation.run import ROWS_SEARCHED
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.decoding import facts_of
from gen2embed_mteb.mmeb.readers import TrainRow
from trainers.data.cells import read_cell, stored_image

ROWS_LOOKED_AT = 10_000
"""A table is refused if none of this many rows at its beginning can be used."""


class Table(Protocol):
    """What reading pairs needs of a table; `SubsetTable` and `JsonLines` have it."""

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""

    def file_of(self, row: int) -> str:
        """Return the file that holds a row."""

    def rows(
        self, columns: Sequence[str], limit: int | None = None, limits: RowLimits | None = None
    ) -> Iterator[dict[str, Any] | RowFault]:
        """Read rows in order."""


class _Content(NamedTuple):
    """A checked cell: its text, and its images as paths or as bytes that are not written to the cache yet."""

    text: str
    images: tuple[str | bytes, ...]


@dataclass(frozen=True)
class PairSubset:
    """A subset whose table has the queries in one column and their positives in another.

    Attributes:
        name: The subset's name.
        table: The subset's table.
        columns: The column of the queries, and that of their positives.
        images: The cache for images that the table embeds.
        image_columns: The columns whose strings are paths of images.
        limit: The number of rows to read; None: all.
        limits: How large a row may be.
    """

    name: str
    table: Table
    columns: tuple[str, str]
    images: CachedImages
    image_columns: tuple[str, ...] = ()
    limit: int | None = None
    limits: RowLimits = field(default_factory=RowLimits)

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""
        return self.table.source

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Read the pairs in order, and write embedded images to the cache.

        Raises:
            DataError: The file is damaged.
            ForeignFileError: An image in the cache is damaged.
        """
        for index, row in enumerate(self._contents(self.limit)):
            yield row if isinstance(row, BadRow) else TrainRow(index, self._kept(row[0]), self._kept(row[1]), None)

    def has_images(self) -> bool:
        """Read the first rows, and return whether one of them has an image; none is written to the cache.

        Raises:
            DataError: The file is damaged.
        """
        rows = self._contents(min(self.limit or ROWS_SEARCHED, ROWS_SEARCHED))
        return any(content.images for row in rows if not isinstance(row, BadRow) for content in row)

    def require_usable(self) -> None:
        """Check that the table has a row that can be used, so that a wrong table is refused before hours of work.

        Raises:
            DataError: There is none among the first `ROWS_LOOKED_AT`; the message says what is wrong with them.
        """
        first: BadRow | None = None
        count = 0
        for count, row in enumerate(self._contents(min(self.limit or ROWS_LOOKED_AT, ROWS_LOOKED_AT)), 1):  # noqa: B007
            if not isinstance(row, BadRow):
                return
            first = first or row
        if first:
            raise DataError(f"{self.source}: none of the first {count} rows can be used: {first.reason}")

    def _contents(self, limit: int | None) -> Iterator[tuple[_Content, _Content] | BadRow]:
        def make(_: int, row: Mapping[str, Any]) -> tuple[_Content, _Content]:
            query, positive = (self._content(row[column], column) for column in self.columns)
            return query, positive

        yield from guarded(self.table.rows(self.columns, limit, self.limits), self.table.file_of, make)

    def _content(self, cell: Any, column: str) -> _Content:
        if isinstance(cell, str) and column not in self.image_columns:
            content = _Content(checked_text(cell, column, self.limits), ())
        elif isinstance(cell, dict):
            try:
                text, images = read_cell(cell)
                content = _Content(
                    checked_text(text or "", column, self.limits), tuple(self._image(image, column) for image in images)
                )
            except TypeError as error:
                raise RowFault(f"{column}: {error}") from None
        elif isinstance(cell, str):
            content = _Content("", (checked_path(cell, column, self.limits),) if cell else ())
        else:
            what = "null" if cell is None else type(cell).__name__
            raise RowFault(f'{column} is {what}, not a text, a path in image_columns, or {{"text", "image"}}')
        if not content.text and not content.images:
            raise RowFault(f"{column} has neither text nor image")
        return content

    def _image(self, image: Any, column: str) -> str | bytes:
        found = stored_image(image) if isinstance(image, dict) else image
        if isinstance(found, bytes):
            facts_of(found, f"in column {column}")
        elif not isinstance(found, str):
            raise TypeError(f'an image is {type(image).__name__}, not a path or {{"bytes", "path"}}')
        else:
            checked_path(found, f"image path of {column}", self.limits)
        return found

    def _kept(self, content: _Content) -> Item:
        if not content.images:
            return Item(content.text)
        paths = (self.images.keep(image) if isinstance(image, bytes) else image for image in content.images)
        return Item(content.text, tuple(paths))
