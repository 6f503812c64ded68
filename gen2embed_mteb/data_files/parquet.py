"""Reading Parquet a few rows at a time; a row that cannot be read is replaced by a `RowFault`.

Cost: one pass over the wanted columns, in bounded memory. pyarrow reads one page at a time, not the whole file. The
sizes in the file's metadata decide how many rows are decoded at once, and Arrow's buffers tell the size of a row before
any Python object is created from it. pyarrow notices invalid UTF-8 only when a value becomes a Python object; a batch
that holds some is then converted row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from gen2embed_mteb.data_files.rows import RowFault, RowLimits
from gen2embed_mteb.data_files.shards import DataError, require_regular
from gen2embed_mteb.errors import one_line

Row = dict[str, Any]
ROWS_AT_ONCE = 64
_BUFFER = 2**20
_WHOLE_BATCH = 8 * 2**20
"""A batch of Arrow data up to this size becomes Python objects at once, a larger one row by row."""
_DECODED_AT_ONCE = 2**28
"""The number of rows decoded at once keeps them below this size, even if each held the largest value of its column."""
_LARGE_GROUP = 2**30
_MAX_GROUP_VALUES = 2**27
_DAMAGE = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
"""The errors that pyarrow raises on a damaged file; the last one if the name of a column is damaged."""
_CONVERSION = (ValueError, TypeError, OverflowError, pyarrow.ArrowException)


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file; only its metadata is read.

    Args:
        path: A regular file.

    Raises:
        DataError: It is not a regular file, or not a Parquet file.
        OSError: The system cannot open it.
    """
    require_regular(path)
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
        _ = file.schema_arrow.names, file.reader.column_paths
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path}: not a readable parquet file ({one_line(error)}); download it again") from error
    return file


def read_rows(
    path: Path, columns: Sequence[str], limits: RowLimits, start: int = 0, stop: int | None = None
) -> Iterator[Row | RowFault]:
    """Read the rows of a file in order.

    Args:
        path: The file.
        columns: The columns to read.
        limits: The largest accepted size of a row.
        start: The number of the first row to read; row groups before it are not read.
        stop: The number behind the last row to read; None: all.

    Yields:
        One dict per row, or its fault.

    Raises:
        DataError: The file is damaged.
        OSError: The system cannot read it.
    """
    with open_parquet(path) as file:
        end = 0
        for group in range(file.num_row_groups):
            first, end = end, end + file.metadata.row_group(group).num_rows
            last = end if stop is None else min(end, stop)
            if last <= start or last <= first:
                continue
            try:
                rows = _group_rows(file, path, group, columns, limits, skipped=max(0, start - first))
                yield from islice(rows, last - max(first, start))
            except _DAMAGE as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                raise DataError(f"{path}: damaged parquet file ({one_line(error)}); download it again") from error


def _group_rows(
    file: pyarrow.parquet.ParquetFile,
    path: Path,
    group: int,
    columns: Sequence[str],
    limits: RowLimits,
    *,
    skipped: int,
) -> Iterator[Row | RowFault]:
    metadata = file.metadata.row_group(group)
    source, num_rows = str(path), metadata.num_rows
    size, num_values = _largest_chunk(metadata, columns)
    if reason := _too_much(num_rows, size, num_values, limits):
        yield from (RowFault(reason, source) for _ in range(num_rows - skipped))
        return
    # A dictionary may encode a long text in few bytes; the text is at most as long as the whole column.
    at_once = max(1, min(ROWS_AT_ONCE, _DECODED_AT_ONCE // max(1, size)))
    done = 0
    try:
        for batch in file.iter_batches(at_once, row_groups=[group], columns=list(columns), use_threads=False):
            before = min(batch.num_rows, max(0, skipped - done))  # skipped rows do not become Python objects
            done += before
            for row in batch_rows(batch.slice(before), limits, source):
                done += 1
                yield row
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowCapacityError) as error:
        # The row holds more than Arrow can hold, and it is unknown where the next row begins.
        reason = f"row group {group} cannot be read from this row on ({one_line(error)})"
        yield from (RowFault(reason, source) for _ in range(num_rows - max(done, skipped)))


def _largest_chunk(metadata: Any, columns: Sequence[str]) -> tuple[int, int]:
    """Return the largest unpacked size in bytes, and the largest number of values, of a column in a row group."""
    chunks = [metadata.column(number) for number in range(metadata.num_columns)]
    wanted = [
        chunk
        for chunk in chunks
        if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns)
    ]
    sizes = [(chunk.total_uncompressed_size, chunk.num_values) for chunk in wanted]
    return max((size for size, _ in sizes), default=0), max((values for _, values in sizes), default=0)


def _too_much(num_rows: int, size: int, num_values: int, limits: RowLimits) -> str:
    """Return the reason why a row group is not read at all; an empty string if it is read."""
    if size > max(_LARGE_GROUP, num_rows * limits.max_row_bytes):
        return (
            f"its row group of {num_rows} rows holds {size} bytes, more than max_row_bytes {limits.max_row_bytes} each"
        )
    if num_values > _MAX_GROUP_VALUES and num_values > num_rows * 1000:
        return f"its row group of {num_rows} rows holds {num_values} values; write the table in smaller row groups"
    return ""


def batch_rows(batch: Any, limits: RowLimits, source: str = "") -> Iterator[Row | RowFault]:
    """Convert a few rows to Python objects.

    Args:
        batch: A `pyarrow.RecordBatch` or `pyarrow.Table`.
        limits: The largest accepted size of a row.
        source: The file, for the faults.

    Yields:
        One dict per row, or its fault.
    """
    if batch.nbytes <= min(_WHOLE_BATCH, limits.max_row_bytes):
        try:
            rows = batch.to_pylist()
        except _CONVERSION:
            rows = None
        if rows is not None:
            yield from rows
            return
    for number in range(batch.num_rows):
        try:
            yield _row(batch.slice(number, 1), limits)
        except RowFault as fault:
            yield RowFault(fault.reason, source)


def _row(batch: Any, limits: RowLimits) -> Row:
    """Return the row of a batch that has one row."""
    row: Row = {}
    size = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = _with_own_buffers(column)
            count = _num_entries(value)
        except _CONVERSION as error:
            raise RowFault(f"{name} cannot be read ({one_line(error)})") from None
        if count > limits.max_candidates:
            raise RowFault(f"{name} has {count} entries, more than max_candidates {limits.max_candidates}")
        size += value.nbytes
        if size > limits.max_row_bytes:
            raise RowFault(f"the row has more than max_row_bytes {limits.max_row_bytes}")
        try:
            row[name] = value.to_pylist()[0]
        except _CONVERSION as error:
            raise RowFault(f"{name} cannot be read ({one_line(error)})") from None
    return row


def _with_own_buffers(column: Any) -> Any:
    """Return the same values in a form whose size can be measured: other forms share buffers with other rows."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        return column.dictionary_decode()
    if pyarrow.types.is_string_view(kind) or pyarrow.types.is_binary_view(kind):
        return column.cast(pyarrow.large_string() if pyarrow.types.is_string_view(kind) else pyarrow.large_binary())
    return column


def _num_entries(column: Any) -> int:
    """Return the length of the list in a column of one row; 0 if the column does not hold lists."""
    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
        return 0
    return int(pyarrow.compute.list_value_length(column)[0].as_py() or 0)
