"""Single files: written under a temporary name and renamed once, and what is foreign is never replaced.

A reader sees all of a file or nothing of it, whatever happens in between. `put` and `remove_stale` are the only
functions here that replace or delete; what they may touch is proved by their callers or by our temporary names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

STALE_SECONDS = 3600
"""A temporary file or folder this old belongs to a process that was killed."""

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.gen2embed-tmp")


class ForeignFileError(Gen2EmbedError):
    """A file is in the way that we cannot prove to be ours; the message names it and the remedy."""

    @classmethod
    def of(cls, path: Path, reason: str) -> ForeignFileError:
        """Return the error for one file.

        Args:
            path: The file.
            reason: Why it is not ours, such as "was not written by gen2embed".
        """
        return cls(f"{path} {reason}, so it is not replaced or deleted; move it away, or choose another folder")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a new file so that readers see all of it or nothing; a file that is there must hold the same bytes.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Raises:
        ForeignFileError: There is another file. To replace one of ours, use `OwnedFolder`.
    """
    if os.path.lexists(path):
        if is_regular(path) and path.read_bytes() == data:
            return
        raise ForeignFileError.of(path, "holds something else than what is to be written")
    put(path, data)


def set_aside(path: Path) -> Path:
    """Rename a file or folder that is in the way and that may be another's, so that nothing of it is lost.

    Args:
        path: The file or folder.

    Returns:
        Its new path, in the same folder: `NAME.set-aside-` and twelve hexadecimal digits.
    """
    kept = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:12]}")
    path.rename(kept)
    return kept


def remove_proved(path: Path, sha256: str) -> bool:
    """Delete a file whose digest the caller knows from a marker of ours; any other file is left as it is.

    Args:
        path: The file.
        sha256: Of what we wrote, 64 hexadecimal digits.

    Returns:
        Whether it was deleted.
    """
    if not is_regular(path) or sha256_of(path) != sha256:
        return False
    path.unlink()
    return True


def json_bytes(value: Any) -> bytes:
    """Return JSON as it is written everywhere: indented, keys in the order given, a newline at the end.

    Args:
        value: Anything that JSON can hold.

    Raises:
        ValueError: The value holds NaN or an infinity, which are no JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path may hold a lone surrogate; `\\udXXX` is how JSON writes it.
    return text.encode("utf-8", "backslashreplace")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Args:
        path: A regular file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_in_scratch(path: Path, data: bytes) -> None:
    """Write a file in a temporary folder of ours, in place of one that a library wrote there.

    Args:
        path: A file below a folder of `OwnedFolder.scratch` or `new_folder`.
        data: The whole content.

    Raises:
        ForeignFileError: It is in no such folder.
    """
    if not any(_TEMPORARY.fullmatch(parent.name) for parent in path.absolute().parents):
        raise ForeignFileError.of(path, "is in no temporary folder of gen2embed")
    put(path, data)


def require_vacant(target: Path) -> None:
    """Refuse a place for a new folder where something is already, but for an empty folder.

    Args:
        target: The place.

    Raises:
        ForeignFileError: Something is there.
    """
    if not os.path.lexists(target):
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    raise ForeignFileError.of(target, "is not an empty folder" if target.is_dir() else "is there already")


def remove_stale(folder: Path, older_than: float = STALE_SECONDS) -> None:
    """Delete temporary files that killed processes left in a folder: those with our name, an hour old or more.

    Args:
        folder: The folder; files in folders of it are not looked at.
        older_than: Seconds; 0 only where `OwnedFolder.exclusive` keeps other processes out.
    """
    oldest = time.time() - older_than
    for path in folder.glob(".*.gen2embed-tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process may clean up, too
            if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime <= oldest:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def new_token() -> str:
    """Return twelve random hexadecimal digits, which tell temporary files of several processes apart."""
    return uuid.uuid4().hex[:12]


def temporary_of(path: Path, token: str) -> Path:
    """Return the temporary name, beside it, of a file or folder.

    Args:
        path: Its place in the end.
        token: Of `new_token`.
    """
    name = os.fsencode(path.name)[:160].decode("utf-8", "ignore")  # with what is added it must still be a name
    return path.with_name(f".{name}.{token}.gen2embed-tmp")


def new_temporary(path: Path) -> Path:
    """Return a new name beside a path: two processes may write the same file at once."""
    return temporary_of(path, new_token())


def put(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it once, whatever was there; callers prove first that they may.

    Args:
        path: The file; its folder must exist.
        data: The whole content.
    """
    temporary = new_temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a full disk: say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_regular(path: Path) -> bool:
    """Return whether a regular file is there; a link to one is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
