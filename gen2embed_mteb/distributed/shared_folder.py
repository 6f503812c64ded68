"""The folder that the driver and the workers of a cluster share: the proof that all see it, and files that appear late.

The driver writes a probe, a small file with a token of this run; a worker refuses a folder without it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import new_token, temporary_of

APPEARANCE_SECONDS = 60.0
"""Seconds after which what a worker has written must be seen here; file systems of networks can be late."""
TOUCH_SECONDS = 60.0

Found = TypeVar("Found")


class Probe:
    """A file that the driver wrote.

    Attributes:
        name: Its name.
        token: Its content.
    """

    def __init__(self, path: Path, token: str) -> None:
        """Keep the arguments; the file must be there."""
        self.name, self.token = path.name, token
        self._path, self._touched = path, time.monotonic()

    def keep(self) -> None:
        """Touch the file now and then: a temporary file that is an hour old counts as left over."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._path.touch()
            self._touched = time.monotonic()


@contextlib.contextmanager
def probe_in(folder: Path) -> Iterator[Probe]:
    """Write a probe into a folder, and delete it in the end.

    Args:
        folder: The folder.
    """
    token = new_token()
    path = temporary_of(folder / "probe", token)
    path.write_text(token, encoding="utf-8")
    try:
        yield Probe(path, token)
    finally:
        path.unlink(missing_ok=True)


def require_same_folder(folder: Path, probe: str, token: str) -> None:
    """Refuse a folder that is not the driver's.

    Args:
        folder: The folder.
        probe: The name of a file in it that the driver wrote.
        token: The content of that file.

    Raises:
        Gen2EmbedError: The file is missing or has another content.
    """
    with contextlib.suppress(OSError):
        if (folder / probe).read_text(encoding="utf-8") == token:
            return
    raise Gen2EmbedError(
        f"{socket.gethostname()} does not see the folder {folder} of the process that started the run; put it on a "
        "file system that all hosts share under the same path (--output_dir, --embedding_dir)"
    )


def wait_until_seen(find: Callable[[], Found | None], folder: Path, what: str) -> Found:
    """Return what a worker has written, as soon as it is seen here.

    Args:
        find: Returns it; None while it is not there.
        folder: Where it is written, for the message.
        what: Its name, for the message.

    Raises:
        Gen2EmbedError: It is not there after `APPEARANCE_SECONDS`.
    """
    started = time.monotonic()
    while (found := find()) is None:
        if time.monotonic() - started > APPEARANCE_SECONDS:
            raise Gen2EmbedError(
                f"{folder}: a worker has written {what}, which is not seen here after {APPEARANCE_SECONDS:.0f} s; put "
                "the folder on a file system that all hosts share"
            )
        time.sleep(0.1)
    return found
