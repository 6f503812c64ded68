"""The files of one part: Parquet, or an `.npy` array with its ids in JSON lines; written in memory, read in blocks.

Parquet columns: `row` (int64, the row's number in the input), `id` (string), `text` (string), `images` (list of
paths), `vector` (fixed-size list of float, halffloat or int8) and, for int8, `scale` (float). The lines beside an array
have the same names, in the same order as the rows of the array.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.shard_checks import DamagedError
from gen2embed_mteb.encode_command.rows import Row
from gen2embed_mteb.encode_command.vectors import Stored

ROWS_AT_ONCE = 4096
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Block:
    """Some rows of a part, in order.

    Attributes:
        rows: (n,) int64, their numbers in the input.
        values: (n, d), as stored.
        scale: (n,) float32 for int8, otherwise None.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]
    scale: npt.NDArray[np.float32] | None = None


def part_names(number: int, file_format: str) -> tuple[str, ...]:
    """Return the names of the files of a part, the one with the vectors first."""
    stem = f"part-{number:06d}"
    return (f"{stem}.parquet",) if file_format == "parquet" else (f"{stem}.npy", f"{stem}.jsonl")


def part_bytes(
    number: int, rows: Sequence[Row], stored: Stored, *, file_format: str, texts: bool, images: bool, facts: str
) -> dict[str, bytes]:
    """Return the content of the files of a part by their names; it depends on the arguments alone.

    Args:
        number: The number of the part.
        rows: n rows.
        stored: Their n vectors.
        file_format: `parquet` or `npy`.
        texts: Whether the rows' texts are written.
        images: Whether the paths of their images are written.
        facts: Text for the metadata of a Parquet file.
    """
    names = part_names(number, file_format)
    if file_format == "parquet":
        return {names[0]: _parquet_bytes(rows, stored, texts, images, facts)}
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(stored.values), allow_pickle=False)
    lines = []
    for index, row in enumerate(rows):
        line: dict[str, Any] = {"row": row.index, "id": row.id}
        line |= {"text": row.text} if texts else {}
        line |= {"images": _paths(row)} if images else {}
        line |= {"scale": float(stored.scale[index])} if stored.scale is not None else {}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return {names[0]: buffer.getvalue(), names[1]: "".join(lines).encode()}


def _paths(row: Row) -> list[str]:
    return [image for image in row.images if isinstance(image, str)]


def _parquet_bytes(rows: Sequence[Row], stored: Stored, texts: bool, images: bool, facts: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    values = np.ascontiguousarray(stored.values)
    flat = pyarrow.array(values.reshape(-1))
    columns: dict[str, Any] = {
        "row": pyarrow.array([row.index for row in rows], pyarrow.int64()),
        "id": pyarrow.array([row.id for row in rows], pyarrow.string()),
    }
    if texts:
        columns["text"] = pyarrow.array([row.text for row in rows], pyarrow.string())
    if images:
        columns["images"] = pyarrow.array([_paths(row) for row in rows], pyarrow.list_(pyarrow.string()))
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    if stored.scale is not None:
        columns["scale"] = pyarrow.array(stored.scale)
    table = pyarrow.table(columns).replace_schema_metadata({"gen2embed": facts})
    buffer = io.BytesIO()
    # Numbers of vectors neither repeat nor shrink: dictionaries, statistics and compression would only cost time.
    plain = [name for name in table.column_names if name != "vector"]
    pyarrow.parquet.write_table(
        table,
        buffer,
        compression={**dict.fromkeys(plain, "zstd"), "images.list.element": "zstd", "vector.list.element": "none"},
        use_dictionary=False,
        write_statistics=[name for name in plain if name != "images"],
    )
    return buffer.getvalue()


def count_rows(folder: Path, names: Sequence[str]) -> int:
    """Return the number of rows of a written part, read from its file.

    Args:
        folder: The folder.
        names: The part's files; those of `part_names`.

    Raises:
        DamagedError: The file cannot be read.
    """
    path = folder / names[0]
    try:
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r", allow_pickle=False))
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (ValueError, EOFError, OSError) as error:  # pyarrow's errors are among them
        if isinstance(error, OSError) and error.errno:
            raise
        raise DamagedError(f"{path.name} cannot be read ({error})") from error


def read_blocks(folder: Path, names: Sequence[str]) -> Iterator[Block]:
    """Read the vectors of a part, some thousand rows at a time.

    Args:
        folder: The folder.
        names: The part's files; those of `part_names`.

    Yields:
        The blocks in order.
    """
    if names[0].endswith(".npy"):
        values = np.load(folder / names[0], mmap_mode="r", allow_pickle=False)
        with (folder / names[1]).open(encoding="utf-8") as lines:
            for start in range(0, len(values), ROWS_AT_ONCE):
                block = np.array(values[start : start + ROWS_AT_ONCE])
                told = [json.loads(next(lines)) for _ in block]
                scale = np.array([one["scale"] for one in told], np.float32) if "scale" in told[0] else None
                yield Block(np.array([one["row"] for one in told], np.int64), block, scale)
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(folder / names[0], pre_buffer=False, buffer_size=2**20) as file:
        columns = [name for name in ("row", "vector", "scale") if name in file.schema_arrow.names]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            vectors = batch.column("vector")
            flat = vectors.flatten().to_numpy(zero_copy_only=False)
            scale = batch.column("scale").to_numpy(zero_copy_only=False) if "scale" in columns else None
            rows = batch.column("row").to_numpy(zero_copy_only=False)
            yield Block(rows, flat.reshape(len(rows), vectors.type.list_size), scale)


def read_labels(folder: Path, names: Sequence[str], wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Return what a part says of some of its rows, besides their vectors: `id`, and `text` and `images` if written.

    Args:
        folder: The folder.
        names: The part's files.
        wanted: The numbers of the rows in the input.

    Returns:
        The labels by number of row.
    """
    if names[0].endswith(".npy"):
        with (folder / names[1]).open(encoding="utf-8") as lines:
            told = (json.loads(line) for line in lines)
            return {one["row"]: one for one in told if one["row"] in wanted}
    import pyarrow.parquet

    found: dict[int, dict[str, Any]] = {}
    with pyarrow.parquet.ParquetFile(folder / names[0], pre_buffer=False, buffer_size=2**20) as file:
        columns = [name for name in ("row", "id", "text", "images") if name in file.schema_arrow.names]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            numbers = batch.column("row").to_pylist()
            places = [place for place, number in enumerate(numbers) if number in wanted]
            found |= {numbers[place]: batch.slice(place, 1).to_pylist()[0] for place in places}
    return found
