"""Writing single files: under a temporary name that is renamed once, and never in place of a foreign file.

A reader sees the complete file or none, even if the process is killed. Only `put`, `remove_proved` and `remove_stale`
replace or delete: `put` relies on its callers' proof that a file is ours, `remove_proved` compares the digest, and
`remove_stale` deletes only our own temporary names.
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
"""The age after which a temporary file or folder must belong to a process that was killed."""

HELD = "held.lock"
"""The lock in a temporary folder of `held_folder`, which `remove_stale` leaves alone."""

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.gen2embed-tmp")


class ForeignFileError(Gen2EmbedError):
    """The error for a file that must not be replaced, as we cannot prove it to be ours; it names file and remedy."""

    @classmethod
    def of(cls, path: Path, reason: str) -> ForeignFileError:
        """Return the error for one file.

        Args:
            path: The file.
            reason: The reason why it is not ours, such as "was not written by gen2embed".
        """
        return cls(f"{path} {reason}, so it is not replaced or deleted; move it away, or choose another folder")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a new file so that readers see all of it or nothing; an existing file must hold the same bytes.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Raises:
        ForeignFileError: A file with other content exists. To replace one of ours, use `OwnedFolder`.
    """
    if os.path.lexists(path):
        if is_regular(path) and path.read_bytes() == data:
            return
        raise ForeignFileError.of(path, "holds something else than what is to be written")
    put(path, data)


def set_aside(path: Path) -> Path:
    """Rename a file or folder that may not be ours and whose name is needed, so that nothing of it is lost.

    Args:
        path: The file or folder.

    Returns:
        Its new path, in the same folder: `NAME.set-aside-` and twelve hexadecimal digits.
    """
    kept = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:12]}")
    path.rename(kept)
    return kept


def remove_proved(path: Path, sha256: str) -> bool:
    """Delete a file whose digest the caller knows from a marker of ours; any other file stays.

    Args:
        path: The file.
        sha256: The SHA-256 of the content that we wrote, 64 hexadecimal digits.

    Returns:
        Whether it was deleted.
    """
    if not is_regular(path) or sha256_of(path) != sha256:
        return False
    path.unlink()
    return True


def json_bytes(value: Any) -> bytes:
    """Return JSON in the form of all our files: indented, keys in the given order, a newline at the end.

    Args:
        value: Anything that JSON can hold.

    Raises:
        ValueError: The value holds NaN or an infinity, which JSON cannot hold.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path may hold a lone surrogate, which JSON writes as `\\udXXX`.
    return text.encode("utf-8", "backslashreplace")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Args:
        path: A regular file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_in_scratch(path: Path, data: bytes) -> None:
    """Write a file in a temporary folder of ours; it may replace a file that a library wrote there.

    Args:
        path: A file below a folder of `OwnedFolder.scratch` or `new_folder`.
        data: The whole content.

    Raises:
        ForeignFileError: The file is not in such a folder.
    """
    if not any(is_temporary(parent.name) for parent in path.absolute().parents):
        raise ForeignFileError.of(path, "is in no temporary folder of gen2embed")
    put(path, data)


def require_vacant(target: Path) -> None:
    """Check that the path of a new folder is free: nothing is there, or an empty folder.

    Args:
        target: The path.

    Raises:
        ForeignFileError: The path is taken.
    """
    if not os.path.lexists(target):
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    raise ForeignFileError.of(target, "is not an empty folder" if target.is_dir() else "is there already")


def remove_stale(folder: Path, older_than: float = STALE_SECONDS) -> None:
    """Delete temporary files that killed processes left in a folder: those with our name that are an hour old.

    Folders of `held_folder` stay: their processes may take longer.

    Args:
        folder: The folder; its subfolders are not searched.
        older_than: Seconds; 0 only where `OwnedFolder.exclusive` keeps other processes out.
    """
    oldest = time.time() - older_than
    for path in folder.glob(".*.gen2embed-tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process may clean up, too
            if is_temporary(path.name) and path.lstat().st_mtime <= oldest:
                if path.is_dir() and not path.is_symlink():
                    if not (path / HELD).exists():
                        shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a temporary file or folder of ours."""
    return _TEMPORARY.fullmatch(name) is not None


def new_token() -> str:
    """Return twelve random hexadecimal digits, which distinguish temporary files of several processes."""
    return uuid.uuid4().hex[:12]


def temporary_of(path: Path, token: str) -> Path:
    """Return the temporary path of a file or folder, which is in the same folder.

    Args:
        path: Its final path.
        token: A token of `new_token`.
    """
    name = os.fsencode(path.name)[:160].decode("utf-8", "ignore")  # the whole name must not become too long
    return path.with_name(f".{name}.{token}.gen2embed-tmp")


def new_temporary(path: Path) -> Path:
    """Return a new temporary path in the same folder, unique since two processes may write the same file at once."""
    return temporary_of(path, new_token())


def put(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it once; callers must prove that a file there may be replaced.

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
        if error.filename is None:  # a full disk: add the path
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_regular(path: Path) -> bool:
    """Return whether the path is a regular file; a link to one does not count."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False
