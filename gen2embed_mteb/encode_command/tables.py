"""Tables as the input of `gen2embed encode`: JSON lines, Parquet files, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from gen2embed_mteb.data_files.json_lines import JsonLines, LineStart
from gen2embed_mteb.data_files.rows import BadRow, RowFault, RowLimits, guarded
from gen2embed_mteb.data_files.shards import DataError, by_table, require_regular, whole_table
from gen2embed_mteb.encode_command.options import JSONL, PARQUET, SAVED, InputOptions
from gen2embed_mteb.encode_command.rows import Columns, Row, find_columns, read_row
from gen2embed_mteb.encode_command.sources import Part, Source, cut, table_files
from gen2embed_mteb.errors import one_line


def open_table(path: Path, kind: str, options: InputOptions) -> Source:
    """Open a table of a known kind.

    Args:
        path: The file or folder.
        kind: `jsonl`, `parquet` or `datasets`.
        options: The columns, and where images are.

    Raises:
        DataError: It cannot be used; the message says why.
    """
    asked = Columns(options.text_column, options.image_column, options.id_column)
    root = image_root(options, path if path.is_dir() else path.parent)
    if kind == SAVED:
        folder = _saved_folder(path, options.split)
        columns = find_columns(load_saved(folder).column_names, asked, str(folder))
        return SavedTable(folder, columns, root, options.limit)
    files = tuple(_ordered(table_files(path, kind))) if path.is_dir() else (path,)
    if not files:
        raise DataError(f"{path}: no .{kind} files in it; pass another --kind, or none")
    if kind == PARQUET:
        from gen2embed_mteb.mmeb.tables import open_files

        opened = open_files(files, "write it again, or pass another --input")
        ends = opened.ends
        return ParquetTable(files, ends, find_columns(opened.columns, asked, str(path)), root, options.limit)
    if kind != JSONL:
        raise DataError(f"{path}: cannot be read as {kind!r}; leave --kind out")
    for file in files:
        JsonLines(file).require_rows()
    names = dict.fromkeys(chain.from_iterable(JsonLines(file).columns for file in files))
    return JsonLinesTable(files, find_columns(tuple(names), asked, str(path)), root, options.limit)


def image_root(options: InputOptions, folder: Path | None) -> Path | None:
    """Return where the images lie that a table names by path: `--image_dir`, or the folder of the table.

    Raises:
        DataError: There is no such folder or archive.
    """
    if not options.image_dir:
        return folder
    root = Path(options.image_dir).expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such folder or archive; correct --image_dir")
    return root


def _ordered(files: Sequence[Path]) -> list[Path]:
    """Return the files in order, after checking that no shard of a table is missing."""
    tables = by_table(files)
    return [
        file
        for name in sorted(tables)
        for file in (whole_table(tables[name]) if len(tables[name]) > 1 else tables[name])
    ]


def _saved_folder(path: Path, split: str) -> Path:
    if (path / "dataset_dict.json").is_file():
        folders = sorted(one.name for one in path.iterdir() if (one / "dataset_info.json").is_file())
        chosen = split or (
            "train" if "train" in folders or not folders else folders[0] if len(folders) == 1 else "train"
        )
        if chosen not in folders:
            raise DataError(f"{path}: no split {chosen!r}; it has {', '.join(folders) or 'none'}. Pass --split")
        return path / chosen
    if split:
        raise DataError(f"{path}: holds one split alone; leave --split out")
    return path


def load_saved(folder: Path) -> Any:
    """Load a folder of `save_to_disk`; its rows stay on disk, and its images encoded.

    Raises:
        DataError: It cannot be loaded, or has no rows.
    """
    import datasets

    for file in folder.iterdir():
        require_regular(file)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # no shards at all raise an IndexError
        what = f"no rows, or no folder of datasets.save_to_disk ({type(error).__name__}: {one_line(error)})"
        raise DataError(f"{folder}: the table has {what}; save it again") from error
    if not len(loaded):
        raise DataError(f"{folder}: the table has no rows")
    return encoded_images(loaded)


def encoded_images(dataset: Any) -> Any:
    """Return a dataset whose images are not decoded: they are opened later, with limits."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def checked_rows(
    cells: Iterator[dict[str, Any] | RowFault], part: Part, file: str, columns: Columns, limits: RowLimits
) -> Iterator[Row | BadRow]:
    """Yield the rows of a part, numbered as in the whole input; faulty ones as a `BadRow`."""
    first = part.first_row
    made = guarded(cells, lambda _: file, lambda index, row: read_row(first + index, row, columns, limits))
    for row in made:
        yield row if isinstance(row, Row) else BadRow(first + row.index, row.file, row.reason)


@dataclass(frozen=True)
class JsonLinesTable:
    """Files with one JSON object per line, one after the other.

    Attributes:
        files: The files, UTF-8.
        columns: The columns that are read.
        image_root: The folder or archive of images that are paths.
        limit: The number of rows to read; None: all.
    """

    files: tuple[Path, ...]
    columns: Columns
    image_root: Path | None
    limit: int | None = None

    @property
    def kind(self) -> str:
        """What it is."""
        return JSONL

    @property
    def source(self) -> str:
        """The first file, for messages."""
        return str(self.files[0])

    @cached_property
    def num_rows(self) -> int:
        """The number of rows; the files are read once for it."""
        return sum(part.num_rows for part in self.parts(2**16))

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order; the files are read once, but nothing is parsed.

        The place of a part: for each of its files, the number of the file, the beginning of the first row, and the
        byte behind the last row (None: the end of the file).
        """
        number = first = count = 0
        pieces: list[tuple[int, LineStart, int | None]] = []
        for file, start in self._starts():
            if count == size or (self.limit is not None and first + count == self.limit):
                yield Part(number, first, count, tuple(_closed(pieces, file, start)))
                number, first, count, pieces = number + 1, first + count, 0, []
                if first == self.limit:
                    return
            if not pieces or pieces[-1][0] != file:
                pieces.append((file, start, None))
            count += 1
        if count:
            yield Part(number, first, count, tuple(pieces))

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Read the rows of a part in order."""
        done = 0
        for file, first, stop in part.place:
            path = self.files[file]
            end = path.stat().st_size if stop is None else stop
            piece = part._replace(first_row=part.first_row + done)
            for row in checked_rows(
                JsonLines(path).rows_at(self.columns.names, limits, first, end), piece, str(path), self.columns, limits
            ):
                done += 1
                yield row

    def _starts(self) -> Iterator[tuple[int, LineStart]]:
        for number, file in enumerate(self.files):
            yield from ((number, start) for start in JsonLines(file).line_starts(RowLimits()))


def _closed(
    pieces: list[tuple[int, LineStart, int | None]], file: int, start: LineStart
) -> Iterator[tuple[int, LineStart, int | None]]:
    """Yield the pieces of a part; the last one ends where the next row begins, if that is in the same file."""
    yield from pieces[:-1]
    last, first, _ = pieces[-1]
    yield last, first, start.byte if last == file else None


@dataclass(frozen=True)
class ParquetTable:
    """Parquet files, one after the other; a part's rows are found by the row counts of row groups.

    Attributes:
        files: The files.
        ends: For each file, how many rows it and those before it have.
        columns: The columns that are read.
        image_root: The folder or archive of images that are paths.
        limit: The number of rows to read; None: all.
    """

    files: tuple[Path, ...]
    ends: tuple[int, ...]
    columns: Columns
    image_root: Path | None
    limit: int | None = None

    @property
    def kind(self) -> str:
        """What it is."""
        return PARQUET

    @property
    def source(self) -> str:
        """The first file, for messages."""
        return str(self.files[0])

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.ends[-1] if self.limit is None else min(self.limit, self.ends[-1])

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order; their place is the range of their rows."""
        for number, start, end in cut(self.num_rows, size):
            yield Part(number, start, end - start, (start, end))

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Read the rows of a part in order."""
        from gen2embed_mteb.data_files.parquet import read_rows

        start, end = part.place
        starts = (0, *self.ends[:-1])
        for number in range(bisect_right(self.ends, start), len(self.files)):
            if starts[number] >= end:
                break
            own, stop = max(0, start - starts[number]), end - starts[number]
            piece = part._replace(first_row=starts[number] + own)
            path = self.files[number]
            cells = read_rows(path, self.columns.names, limits, own, stop)
            yield from checked_rows(cells, piece, str(path), self.columns, limits)


@dataclass(frozen=True)
class SavedTable:
    """A folder of `datasets.save_to_disk`; its rows stay on disk.

    Attributes:
        folder: The folder.
        columns: The columns that are read.
        image_root: The folder or archive of images that are paths.
        limit: The number of rows to read; None: all.
    """

    folder: Path
    columns: Columns
    image_root: Path | None
    limit: int | None = None

    @property
    def kind(self) -> str:
        """What it is."""
        return SAVED

    @property
    def source(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    @cached_property
    def _loaded(self) -> Any:
        return load_saved(self.folder).select_columns(list(self.columns.names)).with_format("arrow")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self._loaded) if self.limit is None else min(self.limit, len(self._loaded))

    def parts(self, size: int) -> Iterator[Part]:
        """Yield the parts in order; their place is the range of their rows."""
        for number, start, end in cut(self.num_rows, size):
            yield Part(number, start, end - start, (start, end))

    def rows(self, part: Part, limits: RowLimits) -> Iterator[Row | BadRow]:
        """Read the rows of a part in order."""
        yield from checked_rows(self._cells(part, limits), part, self.source, self.columns, limits)

    def _cells(self, part: Part, limits: RowLimits) -> Iterator[dict[str, Any] | RowFault]:
        from gen2embed_mteb.data_files.parquet import ROWS_AT_ONCE, batch_rows

        start, end = part.place
        read = partial(batch_rows, limits=limits, source=self.source)
        for first in range(start, end, ROWS_AT_ONCE):
            yield from read(self._loaded[first : min(end, first + ROWS_AT_ONCE)].combine_chunks())
