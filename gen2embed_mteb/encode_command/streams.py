"""A data set of the hub as the input of `gen2embed encode`: read row by row over the network, and not kept."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gen2embed_mteb.data_files.rows import BadRow, RowLimits
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.encode_command.options import STREAM, InputOptions
from gen2embed_mteb.encode_command.rows import Columns, Row, find_columns
from gen2embed_mteb.encode_command.sources import Part, cut
from gen2embed_mteb.encode_command.tables import checked_rows, encoded_images, image_root
from gen2embed_mteb.errors import one_line


def open_stream(options: InputOptions) -> Stream:
    """Open a data set of the hub, or a local folder of data files as `datasets.load_dataset` reads it.

    Args:
        options: Its name, configuration and split, and the columns.

    Raises:
        DataError: It cannot be found or read.
    """
    columns = Columns(options.text_column, options.image_column, options.id_column)
    stream = Stream(options.input, options.subset, options.split or "train", Columns(), options)
    try:
        first = next(iter(stream.load()), None)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(
            f"{options.input}: split {stream.split!r} cannot be read ({one_line(error)}); check the name, --subset and "
            "--split"
        ) from error
    if first is None:
        raise DataError(f"{options.input}: split {stream.split!r} has no rows")
    stream.columns = find_columns(tuple(first), columns, options.input)
    return stream


class Stream:
    """A data set that is read from its beginning; a part that is not next in turn is reached by skipping rows.

    Attributes:
        kind: What it is.
        source: Its name.
        split: Its split.
        columns: The columns that are read.
        image_root: The folder or archive of images that are paths; None without `--image_dir`.
    """

    kind = STREAM

    def __init__(self, source: str, subset: str, split: str, columns: Columns, options: InputOptions) -> None:
        """Keep the arguments; nothing is read yet."""
        self.source, self.subset, self.split, self.columns = source, subset, split, columns
        self.image_root: Path | None = image_root(options, None)
        self._limit = options.limit
        self._num_rows: int | None = None
        self._next = 0
        self._rest: Iterator[dict[str, Any]] | None = None

    def load(self) -> Any:
        """Return the rows as `datasets` streams them, with images that are not decoded."""
        import datasets

        return encoded_images(datasets.load_dataset(self.source, self.subset or None, split=self.split, streaming=True))

    @property
    def num_rows(self) -> int:
        """The number of rows, as the data set states it; otherwise the rows are read once and counted."""
        if self._num_rows is None:
            loaded = self.load()
            stated = (loaded.info.splits or {}).get(self.split)
            count = stated.num_examples if stated is not None else None
            if not count:
                count = sum(1 for _ in islice(loaded.select_columns(list(self.columns.names[:1])), self._limit))
            self._num_rows = count if self._limit is None else min(self._limit, count)
        return self._num_rows

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order; their place is the range of their rows."""
        for number, start, end in cut(self.num_rows, size):
            yield Part(number, start, end - start, (start, end))

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Read the rows of a part in order."""
        yield from checked_rows(self._cells(part), part, self.source, self.columns, limits)

    def _cells(self, part: Part) -> Iterator[dict[str, Any]]:
        start, end = part.place
        if self._rest is None or self._next != start:
            self._next, self._rest = start, iter(self.load().select_columns(list(self.columns.names)).skip(start))
        for row in islice(self._rest, end - start):
            self._next += 1
            yield row

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connection behind."""
        return {**vars(self), "_next": 0, "_rest": None}
