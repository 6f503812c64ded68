"""Finding out what an input is: a folder of pictures, a table, a folder of `datasets`, or a streamed data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.encode_command.options import PICTURES, SAVED, EncodeOptions, InputOptions
from gen2embed_mteb.encode_command.parts_folder import is_written
from gen2embed_mteb.encode_command.sources import (
    PICTURE_ENDINGS,
    TABLE_ENDINGS,
    Pictures,
    Source,
    table_files,
    walk,
)
from gen2embed_mteb.encode_command.streams import open_stream
from gen2embed_mteb.encode_command.tables import open_table


def open_source(options: InputOptions) -> Source:
    """Find out what an input is; no row is read but for the columns of JSON lines.

    Args:
        options: The input, and what the user said of it.

    Raises:
        DataError: There is no such input, it is unclear what it is, or it has no rows.
        Gen2EmbedError: A flag does not fit it.
    """
    path = Path(options.input).expanduser()
    if options.streaming:
        return open_stream(options)
    if not os.path.lexists(path):
        hint = "; for a data set of the hub pass --streaming" if options.input.count("/") <= 1 else ""
        raise DataError(f"{options.input}: no such file or folder{hint}")
    kind = options.kind or _kind_of(path)
    _refuse(options, ("subset",) if kind == SAVED else ("subset", "split"), "for data sets")
    if kind == PICTURES:
        _refuse(options, ("text_column", "image_column", "id_column", "image_dir"), "for tables")
        if not path.is_dir():
            raise DataError(f"{path}: no folder; pass a folder of pictures as --input")
        pictures = Pictures(path, options.limit)
        if next(pictures.parts(1), None) is None:
            raise DataError(f"{path}: no pictures ({', '.join(sorted(PICTURE_ENDINGS))}) and no tables in it")
        return pictures
    return open_table(path, kind, options)


def require_apart(options: EncodeOptions) -> None:
    """Refuse an output folder in which what is written would be read as input.

    A folder of pictures may hold the output folder, whose files are no pictures.

    Args:
        options: Input and output.

    Raises:
        DataError: The output folder is the input, or is in a folder of `datasets.save_to_disk`; or the input is a file
            of the output folder with a name that is written there.
    """
    if options.streaming:
        return
    read, written = (Path(name).expanduser().resolve() for name in (options.input, options.output_dir))
    if read == written or (_is_saved(read) and written.is_relative_to(read)):
        what = "is the folder of the input" if read == written else f"is in the input, {options.input}"
        raise DataError(
            f"{options.output_dir}: {what}, and what is written there would be mixed with it; pass another --output_dir"
        )
    if read.parent == written and is_written(read.name):
        raise DataError(
            f"{options.input}: a file of this name is written to {options.output_dir}; pass another --output_dir"
        )


def _is_saved(path: Path) -> bool:
    """Return whether a folder is of `datasets.save_to_disk`, which writes one of these."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _kind_of(path: Path) -> str:
    if not path.is_dir():
        if path.suffix.lower() in TABLE_ENDINGS:
            return TABLE_ENDINGS[path.suffix.lower()]
        raise DataError(
            f"{path}: neither a folder nor a file that ends in {', '.join(TABLE_ENDINGS)}; pass one of these, or name "
            "the file after what it is"
        )
    if _is_saved(path):
        return SAVED
    found = {TABLE_ENDINGS[file.suffix.lower()] for file in table_files(path)}
    if len(found) > 1:
        raise DataError(f"{path}: holds .jsonl and .parquet files; pass --kind jsonl or --kind parquet")
    if found and next(walk(path), None) is not None:
        raise DataError(f"{path}: holds pictures and tables; pass --kind pictures, or --kind {found.pop()}")
    return found.pop() if found else PICTURES


def _refuse(options: InputOptions, names: Sequence[str], what: str) -> None:
    """Refuse flags that would have no effect on this kind of input."""
    if given := [f"--{name}" for name in names if getattr(options, name)]:
        raise DataError(f"{options.input}: {', '.join(given)} is {what}, and this is none; leave it out")
