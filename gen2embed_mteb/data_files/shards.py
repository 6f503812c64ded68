"""Finding the files of one table: they must be the shards 0 … N-1 of one split, each exactly once.

A table is one file, or several numbered files: `test-00000-of-00003.parquet`, with or without the 16 hexadecimal digits
that older versions of `datasets` append, or `0000.parquet`, `0001.parquet`. A missing shard, a second copy of a shard,
or the same table divided twice in different ways would silently give wrong rows; so these are errors that name the
files. Only file names are read here, not the files.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError

_SHARD = re.compile(r"(?P<table>.+?)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]{16})?")
_COPY = re.compile(r" ?\(\d+\)$| ?- ?[Cc]opy(?: ?\(\d+\))?$")
_NUMBERED = re.compile(r"(?P<table>.*?)(?P<number>\d+)(?P<rest>\D.*)?")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The words in file names that `datasets` recognises as splits, and the split that each stands for."""
_SHOWN = 6


class DataError(Gen2EmbedError):
    """The error for data that cannot be used at all; the message names the file, the fault and the remedy."""


def require_regular(path: Path) -> Path:
    """Check that a path is a regular file or a link to one, and return it; a pipe would block, a device never end.

    Args:
        path: The file.

    Raises:
        DataError: It is not a regular file; it was not opened.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path") from error
    if not stat.S_ISREG(mode):
        raise DataError(f"{path}: no regular file; replace it by the file itself")
    return path


def is_utf8(name: str) -> bool:
    """Return whether a file's name can be written into a report, since Linux allows any bytes in names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def table_name(path: Path) -> str:
    """Return the name of a file's table: its stem without shard numbers.

    Args:
        path: `cats.parquet` or `cats-00000-of-00004.parquet`.
    """
    shard = _SHARD.fullmatch(path.stem)
    return shard["table"] if shard else path.stem


def by_table(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by the name of their table; a copy (`cats (1).parquet`) belongs to the same table as its original.

    Args:
        files: The files of one folder.
    """
    tables: dict[str, list[Path]] = {}
    for path in files:
        tables.setdefault(table_name(path.with_stem(_COPY.sub("", path.stem) or path.stem)), []).append(path)
    return {table_name(group[0]) if len(group) == 1 else name: group for name, group in tables.items()}


def split_files(folder: Path, split: str) -> list[Path]:
    """Return the Parquet files `SPLIT.parquet`, `SPLIT-*.parquet` of a folder, and those in its subfolder SPLIT.

    Files of another split whose name begins in the same way (`test-hard-00000-of-00001.parquet`, `test-hard.parquet`)
    are left out; a copy (`test-00000-of-00001 (1).parquet`) is included.

    Args:
        folder: The subset's folder.
        split: The split's name, spelled as in the file names.
    """
    found = [path for path in _parquet_files(folder) if _is_of(path.stem, split)]
    inner = folder / split
    return found + (_parquet_files(inner) if inner.is_dir() else [])


def _is_of(stem: str, split: str) -> bool:
    if stem == split:
        return True
    rest = stem.removeprefix(split)
    return rest != stem and (rest[1:].isdigit() or re.match(r"-\d+-of-|" + _COPY.pattern, rest) is not None)


def _parquet_files(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Names that begin with a dot belong to programs (such as `._0000.parquet` of macOS).
    return [path for path in paths if path.suffix == ".parquet" and not path.name.startswith(".") and not path.is_dir()]


def whole_table(files: Sequence[Path], split: str = "") -> tuple[Path, ...]:
    """Return the files of one table in order, after checking that they are complete and each is there once.

    Args:
        files: At least one file.
        split: If given, a single file called `0003` or `SPLIT-3` counts as one of several files, too.

    Raises:
        DataError: A shard is missing or there twice, the table is divided in two different ways, or it is unclear
            whether the files belong together; the message names them.
    """
    for path in files:
        require_regular(path)
    shards = [_SHARD.fullmatch(_COPY.sub("", path.stem)) for path in files]
    matched = [shard for shard in shards if shard]
    if not matched:
        alone = len(files) == 1 and not (split and files[0].stem.removeprefix(f"{split}-").isdigit())
        return tuple(files) if alone else _numbered(files)
    if len(matched) < len(files) or len({path.parent for path in files}) > 1:
        raise _unclear(files, "lie side by side")
    counts = {int(shard["count"]) for shard in matched}
    if len(counts) > 1:
        raise _unclear(files, "are of different ways of cutting one table")
    return _in_order(files, [int(shard["number"]) for shard in matched], counts.pop())


def _numbered(files: Sequence[Path]) -> tuple[Path, ...]:
    found = [_NUMBERED.fullmatch(path.stem) for path in files]
    numbers = [match for match in found if match]
    alike = len({(path.parent, match["table"]) for path, match in zip(files, numbers, strict=False)}) == 1
    if len(numbers) < len(files) or not alike:
        raise _unclear(files, "lie side by side")
    return _in_order(files, [int(match["number"]) for match in numbers], len(files))


def _in_order(files: Sequence[Path], numbers: Sequence[int], count: int) -> tuple[Path, ...]:
    by_number = dict(zip(numbers, files, strict=True))
    if len(by_number) < len(files):
        twice = sorted(number for number in by_number if numbers.count(number) > 1)
        raise _unclear(
            [path for path, number in zip(files, numbers, strict=True) if number in twice], "are the same shard"
        )
    missing = list(islice((number for number in range(count) if number not in by_number), _SHOWN + 1))
    if missing or len(files) != count:
        shown = ", ".join(map(str, missing[:_SHOWN])) + (" …" if len(missing) > _SHOWN else "")
        what = f"shard {shown} of 0 to {count - 1} is missing" if missing else f"more than {count} shards"
        raise DataError(f"{_listed(files)}: {what}; download the rest, or write the table again")
    return tuple(by_number[number] for number in range(count))


def _unclear(files: Sequence[Path], what: str) -> DataError:
    return DataError(f"{_listed(files)} {what}, and rows would be missing or count twice; keep one whole set of files")


def _listed(files: Sequence[Path]) -> str:
    parents = {path.parent for path in files}
    names = [path.name if len(parents) == 1 else str(path) for path in files]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"{files[0].parent}: {shown}" if len(parents) == 1 else shown


def split_of(path: Path) -> str | None:
    """Return the split that a file's name contains as a word between `-`, `_`, `.` or blanks, as `datasets` reads it.

    Args:
        path: A file such as `train-00000-of-00002.parquet` or `cats_dev.jsonl`.

    Returns:
        `train`, `validation` or `test`; None if the name contains none.

    Raises:
        DataError: The name contains two splits.
    """
    words = re.split(r"[-_.\s\d]+", table_name(path).lower())
    found = sorted({_SPLITS[word] for word in words if word in _SPLITS})
    if len(found) > 1:
        raise DataError(f"{path}: its name speaks of the splits {' and '.join(found)}; rename it")
    return found[0] if found else None


def canonical_split(split: str) -> str:
    """Return the split that a word stands for, such as `validation` for `dev`; other words are returned unchanged."""
    return _SPLITS.get(split.lower(), split)


def of_split(files: Iterable[Path], split: str) -> list[Path]:
    """Return those files of a folder that belong to one split.

    If no file names a split, all files belong to `train`.

    Args:
        files: The files of a folder.
        split: The split.

    Raises:
        DataError: No file belongs to the split, or some files name a split and others do not.
    """
    splits = {path: split_of(path) for path in files}
    marked, plain = [path for path in splits if splits[path]], [path for path in splits if not splits[path]]
    if not marked and canonical_split(split) == "train":
        return plain
    if not marked:
        raise DataError(f"{_listed(plain)}: no split {split!r}, the names say none; leave --split out, or rename them")
    if plain:
        raise DataError(
            f"{_listed(plain)}: it is not clear of which split, since {marked[0].name} beside names one; name the "
            "split in all of them, or pass one file as --data_dir"
        )
    chosen = [path for path in marked if splits[path] == canonical_split(split)]
    # If there are files of both `dev` and `validation`, these are two splits.
    exact = [path for path in chosen if split.lower() in re.split(r"[-_.\s\d]+", table_name(path).lower())]
    if not chosen:
        known = ", ".join(sorted({str(name) for name in splits.values()}))
        raise DataError(f"{_listed(marked)}: no file of split {split!r}, only of {known}; pass another --split")
    return exact or chosen
