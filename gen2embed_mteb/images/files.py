"""Reading an image's file: only where the data may point, only a regular file, never more than a limit of bytes.

What the data says is confined by its words: no `..`, no absolute path elsewhere. Links are another matter: they lie in
the user's own folder. One that leads out of it is followed within the hub's cache, whose snapshots consist of links to
the blobs beside them, and anywhere else if the user says so (`follow_links`).
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
"""The largest file, or unpacked member of a zip archive; the biggest photo of MMEB is far below a tenth of it."""

FOLLOW_LINKS = "GEN2EMBED_FOLLOW_LINKS"
"""The variable that stands for `--follow_links` where there is no command line of ours."""

_URL = re.compile(r"[a-z][a-z0-9+.-]+://|(?:https?|ftp|file):/", re.IGNORECASE)
_HUB_FOLDER = re.compile(r"(?:datasets|models|spaces)--.+")
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def read_file(path: str | Path, root: str | Path | None, max_bytes: int, *, follow_links: bool = False) -> bytes:
    """Read a whole file.

    Args:
        path: The file; relative to `root` when that is given.
        root: If given, the folder that the file must lie in; see `confined`.
        max_bytes: The largest size accepted; a larger file is not read at all.
        follow_links: As for `confined`.

    Raises:
        ImageError: An address instead of a path, missing, outside of `root`, no regular file, or too large.
        OSError: The system is out of memory or file descriptors, which is no fault of the file.
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


class NotRegularError(OSError):
    """A folder, pipe, socket or device, where a regular file is expected."""


def open_regular(path: Path, *, follow_links: bool = True) -> IO[bytes]:
    """Open a regular file to read: a pipe or a device would block, or never end.

    Args:
        path: The file.
        follow_links: Whether the path may be a link itself; not where links were resolved before.

    Raises:
        NotRegularError: Something else is there. What was opened is what is asked, so that nothing can come between.
        OSError: It cannot be opened.
    """
    # Asked before as well: to open a device may do something.
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
    """Refuse what is no path, but an address or an image written as text.

    Args:
        name: What was given as a path.

    Raises:
        ImageError: It is a data URI or a URL; the message says what to do instead.
    """
    if DATA_URI.match(name):
        raise ImageError(
            name, "a data URI is not opened", "decode its base64, and pass a PIL image or the path of a file"
        )
    if _URL.match(name):
        # A user's name and password, and a signature behind the question mark, are nobody else's business.
        address = re.sub(r"//[^/@]*@", "//", name.partition("?")[0])
        raise ImageError(
            address, "nothing is fetched from a URL", "download it, and pass the path of the file, or a PIL image"
        )


def confined(path: str | Path, root: str | Path, *, follow_links: bool = False) -> Path:
    """Resolve a path that data names inside a folder.

    Args:
        path: A path relative to `root`, without `..`. An absolute path is accepted only when it lies inside `root`.
        root: The folder that must not be left.
        follow_links: Whether links in the folder may lead out of it. Without it they may lead to another place in the
            folder, and, in a snapshot of the hub's cache, to the blobs of the same repository.

    Returns:
        The resolved path of a regular file.

    Raises:
        ImageError: The path leaves `root`, does not exist or is no regular file.
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
    """Return whether a resolved path is a blob of the repository whose snapshot in the hub's cache the folder lies in."""
    for folder in base.parents:
        if _HUB_FOLDER.fullmatch(folder.name):
            return base.is_relative_to(folder / "snapshots") and target.parent == folder / "blobs"
    return False


def follows_links() -> bool:
    """Return whether the environment says to follow links, for mteb, which has no flag of ours."""
    return os.environ.get(FOLLOW_LINKS, "").lower() not in ("", "0", "false", "no")
