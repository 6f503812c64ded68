"""A query and its positive in two columns of a table, read row by row; and explicit negatives in further columns.

A cell of positives may be a list: then the query has several. A cell of negatives may be a list, too, or empty (null),
where a row has fewer than others. Two equal entries count once. A row with no positive, or with a positive that is also
a negative, cannot be used.
"""

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


class _Row(NamedTuple):
    """A checked row."""

    query: _Content
    positives: tuple[_Content, ...]
    negatives: tuple[_Content, ...]

    @property
    def cells(self) -> tuple[_Content, ...]:
        return (self.query, *self.positives, *self.negatives)


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
        negatives: The columns of explicit negatives; their strings are texts or paths, as in the positives' column.
        several: Whether a cell of positives may be a list.
    """

    name: str
    table: Table
    columns: tuple[str, str]
    images: CachedImages
    image_columns: tuple[str, ...] = ()
    limit: int | None = None
    limits: RowLimits = field(default_factory=RowLimits)
    negatives: tuple[str, ...] = ()
    several: bool = False

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
            if isinstance(row, BadRow):
                yield row
                continue
            positive, *more = map(self._kept, row.positives)
            yield TrainRow(
                index, self._kept(row.query), positive, None, tuple(more), tuple(map(self._kept, row.negatives))
            )

    def has_images(self) -> bool:
        """Read the first rows, and return whether one of them has an image; none is written to the cache.

        Raises:
            DataError: The file is damaged.
        """
        rows = self._contents(min(self.limit or ROWS_SEARCHED, ROWS_SEARCHED))
        return any(content.images for row in rows if not isinstance(row, BadRow) for content in row.cells)

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

    def _contents(self, limit: int | None) -> Iterator[_Row | BadRow]:
        _, of_positives = self.columns

        def make(_: int, row: Mapping[str, Any]) -> _Row:
            query = self._content(row[self.columns[0]], self.columns[0])
            positives = self._listed(row[of_positives], of_positives) if self.several else None
            if positives is None:
                positives = {self._content(row[of_positives], of_positives): of_positives}
            if not positives:
                raise RowFault(f"{of_positives} is an empty list; a query needs a positive")
            negatives: dict[_Content, str] = {}
            for column in self.negatives:
                if not _is_missing(row[column]):
                    listed = self._listed(row[column], column)
                    negatives |= {self._content(row[column], column): column} if listed is None else listed
            for content in positives:
                if content in negatives:
                    raise RowFault(f"{negatives[content]} is also a positive of the row ({positives[content]})")
            return _Row(query, tuple(positives), tuple(negatives))

        columns = dict.fromkeys((*self.columns, *self.negatives))
        yield from guarded(self.table.rows(tuple(columns), limit, self.limits), self.table.file_of, make)

    def _listed(self, cell: Any, column: str) -> dict[_Content, str] | None:
        """Return the entries of a list, each once, with their names for messages; `None` if the cell is no list."""
        if not isinstance(cell, list):
            return None
        if len(cell) > self.limits.max_candidates:
            raise RowFault(f"{column} has {len(cell)} entries, more than max_candidates {self.limits.max_candidates}")
        found: dict[_Content, str] = {}
        for number, entry in enumerate(cell):
            found.setdefault(self._content(entry, f"{column}[{number}]"), f"{column}[{number}]")
        return found

    def _content(self, cell: Any, column: str) -> _Content:
        if isinstance(cell, str) and not self._holds_paths(column):
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

    def _holds_paths(self, column: str) -> bool:
        """Whether strings of a column, or of a list in it, are paths of images."""
        query, positive = self.columns
        return (query if column == query else positive) in self.image_columns

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


def _is_missing(cell: Any) -> bool:
    """Say whether a row has no negative in a column: null or empty, as tables fill up what a row lacks."""
    if isinstance(cell, dict):
        return all(_is_missing(value) for value in cell.values())
    return cell is None or (isinstance(cell, str | list) and not cell)
