"""Creating a folder that appears complete: it is filled under a temporary name beside its place, and renamed once.

Cost: `new_folder` and `damage` read every file of the folder once for its digest, about a second per gigabyte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gen2embed_mteb.storage.atomic import new_token, require_vacant, sha256_of, temporary_of
from gen2embed_mteb.storage.owned_folder import LEDGER, LOCK, OwnedFolder


@contextlib.contextmanager
def new_folder(target: Path, writer: str, token: str | None = None) -> Iterator[Path]:
    """Create a folder that appears complete: it is filled under a temporary name beside its place, then renamed once.

    The folder gets a ledger of all its files. After an exception it is deleted, and `target` stays as it was.

    Args:
        target: The folder; it must be missing or empty.
        writer: The command that writes, as in `OwnedFolder`.
        token: A token of `new_token`, with which other processes find the temporary folder by `temporary_of` and write
            into it.

    Yields:
        The temporary folder, empty.

    Raises:
        ForeignFileError: Something else is at `target`, at the beginning or at the end.
    """
    require_vacant(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_of(target, token or new_token())
    folder.mkdir()
    try:
        yield folder
        _write_ledger(folder, writer)
        require_vacant(target)
        if os.name == "nt" and target.is_dir():
            target.rmdir()  # Windows renames onto nothing
        folder.replace(target)  # replaces an empty folder too; fails on any other
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def damage(folder: Path, writer: str) -> str | None:
    """Return what is wrong with a folder of `new_folder`, or None if every file is as it was written.

    Args:
        folder: The folder.
        writer: The command that wrote it.

    Returns:
        The first fault, by order of file names, such as "optimizer.pt is missing".
    """
    owned = OwnedFolder(folder, writer)
    names = owned.known()
    if not names:
        return f"it has no ledger of gen2embed {writer}"
    for name in names:
        if not os.path.lexists(folder / name):
            return f"{name} is missing"
        if fault := owned.fault(name):
            return f"{name} {fault}"
    return None


def _write_ledger(folder: Path, writer: str) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    owned = OwnedFolder(folder, writer)
    owned.record({name: [sha256_of(folder / name)] for name in names if name not in (LEDGER, LOCK)})
