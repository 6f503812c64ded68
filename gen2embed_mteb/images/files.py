"""Reading the file of an image: only inside the given folder, only a regular file, and only up to a limit of bytes.

Paths in the data come from others, so a path with `..` or an absolute path to another folder is refused. Links are
different, since they are in the user's own folder. A link that leads out of the folder is followed within the hub's
cache, whose snapshots consist of links to blobs, and elsewhere only if the user allows it (`follow_links`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path, PurePath
from typing import IO

from gen2embed_mteb.errors import is_of_the_system
from gen2embed_mteb.images.errors import DATA_URI, ImageError

MAX_FILE_BYTES = 256 * 2**20
"""The largest file, or unpacked member of a zip archive; the largest photo of MMEB is far below a tenth of it."""

FOLLOW_LINKS = "GEN2EMBED_FOLLOW_LINKS"
"""The environment variable that replaces `--follow_links` where our command line is not used."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|(?:https?|ftp|file):/", re.IGNORECASE)
_HUB_FOLDER = re.compile(r"(?:datasets|models|spaces)--.+")
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: str | Path, root: str | Path | None, max_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a whole file.

    Args:
        path: The file; relative to `root` when that is given.
        root: If given, the folder that must contain the file; see `confined`.
        max_bytes: The largest accepted size; a larger file is not read at all.
        follow_links: As for `confined`.

    Raises:
        ImageError: The path is a URL or data URI, or the file is missing, outside of `root`, not regular, or too large.
        OSError: The system has no memory or file descriptors left, which is not a fault of the file.
    """
    name = str(path)
    refuse_address(name)
    target = Path(path) if root is None else confined(path, root, follow_links=follow_links)
    try:
        with open_regular(target, follow_links=root is None) as file:
            size = os.fstat(file.fileno()).st_size
            # A file may grow while it is read.
            data = b"" if size > max_bytes else file.read(max_bytes + 1)
    except NotRegularError as error:
        raise ImageError(name, "not a regular file", "correct the path in the data") from error
    except FileNotFoundError as error:
        raise ImageError(name, "not found", "check the path") from error
    except OSError as error:
        if is_of_the_system(error):
            raise
        raise ImageError(name, f"cannot be read ({error.strerror})", "check its permissions") from error
    except ValueError as error:  # a null byte, or a surrogate that no file's name can have
        raise ImageError(name, "unusable path", "correct the path in the data") from error
    if size > max_bytes or len(data) > max_bytes:
        raise ImageError(name, f"{max(size, len(data))} bytes exceed the limit of {max_bytes}", "shrink it")
    return data


def stamp_of(path: Path) -> list[int]:
    """Return what the system changes when a file is changed or replaced: two times in nanoseconds, inode and size.

    The second time is set by the system alone, but on Windows, where it is that of creation.
    """
    found = path.stat()
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size]


class NotRegularError(OSError):
    """A folder, pipe, socket or device, where a regular file is expected."""


def open_regular(path: Path, *, follow_links: bool = True) -> IO[bytes]:
    """Open a regular file for reading; a pipe or a device would block, or never end.

    The check is repeated on the opened file, so that a file that is replaced in the meantime is noticed.

    Args:
        path: The file.
        follow_links: Whether the path itself may be a link; False if links were resolved before.

    Raises:
        NotRegularError: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    # Check before opening as well: opening a device may have an effect.
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
    descriptor = os.open(path, _FLAGS if follow_links else _FLAGS | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def refuse_address(name: str) -> None:
    """Refuse a text that is a URL or a data URI instead of a path.

    Args:
        name: The text that was given as a path.

    Raises:
        ImageError: The text is a data URI or a URL; the message says what to do instead.
    """
    if DATA_URI.match(name):
        raise ImageError(
            name, "a data URI is not opened", "decode its base64, and pass a PIL image or the path of a file"
        )
    if _URL.match(name):
        # The message must not show a user's name, password, or a signature after the question mark.
        address = re.sub(r"//[^/@]*@", "//", name.partition("?")[0])
        raise ImageError(
            address,
            "nothing is fetched from a URL",
            "download it, and pass the path of the file, or a PIL image; for addresses in data see --remote_images",
        )


def confined(path: str | Path, root: str | Path, *, follow_links: bool = False) -> Path:
    """Resolve a path from the data inside a folder.

    Args:
        path: A path relative to `root`, without `..`. An absolute path is accepted only if it is inside `root`.
        root: The folder that must contain the file.
        follow_links: Whether links in the folder may lead out of it. Otherwise they may lead to another place in the
            folder, and, in a snapshot of the hub's cache, to the blobs of the same repository.

    Returns:
        The resolved path of a regular file.

    Raises:
        ImageError: The path leads out of `root`, does not exist, or is not a regular file.
    """
    name = str(path)
    outside = ImageError(name, f"leads outside of {str(root)!r}", "point --image_dir at the folder that holds it")
    pure = PurePath(path)
    try:
        base = Path(root).resolve()
        if ".." in pure.parts:
            raise outside
        if pure.is_absolute() and not any(pure.is_relative_to(top) for top in (base, Path(root).absolute())):
            raise outside
        target = (base / path).resolve(strict=True)
        regular = target.is_file()
    except FileNotFoundError as error:
        raise ImageError(
            name, f"not found in {str(root)!r}", "check --image_dir, or download the file again"
        ) from error
    except ImageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null byte, loop of links
        if is_of_the_system(error):
            raise
        fault = getattr(error, "strerror", None) or type(error).__name__
        raise ImageError(name, f"unusable path ({fault})", "correct the path in the data") from error
    if not (follow_links or target.is_relative_to(base) or _in_same_repository(target, base)):
        raise ImageError(
            name,
            f"a link that leads outside of {str(root)!r}",
            f"pass --follow_links (or set {FOLLOW_LINKS}=1) if the links in that folder are yours",
        )
    if not regular:
        raise ImageError(name, "not a regular file", "correct the path in the data")
    return target


def _in_same_repository(target: Path, base: Path) -> bool:
    """Return whether `base` is in a snapshot of the hub's cache, and `target` is a blob of the same repository."""
    for folder in base.parents:
        if _HUB_FOLDER.fullmatch(folder.name):
            return base.is_relative_to(folder / "snapshots") and target.parent == folder / "blobs"
    return False


def follows_links() -> bool:
    """Return whether the environment says to follow links; for mteb, whose command line lacks our flag."""
    return os.environ.get(FOLLOW_LINKS, "").lower() not in ("", "0", "false", "no")
