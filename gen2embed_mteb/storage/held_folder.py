"""A temporary folder that belongs to a process for as long as that lives, however long it takes.

The process holds a lock in the folder. A process that was killed holds none, so another one on the same host can tell
at once, without waiting for the folder to grow old, that nobody needs it any more. Some file systems keep locks from
other hosts: their folders must be a day old as well.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from gen2embed_mteb.storage.atomic import HELD, is_temporary, new_temporary

_HOST = "host"
_DAY = 24 * 3600


@contextlib.contextmanager
def held_folder(path: Path, guard: AbstractContextManager[object]) -> Iterator[Path]:
    """Make a temporary folder, and delete it in the end.

    Args:
        path: What its name is made of; it is in the same folder.
        guard: The lock under which all processes make and remove such folders here.

    Yields:
        The folder, empty but for its lock and the name of the host.
    """
    folder = new_temporary(path)
    held = FileLock(folder / HELD, thread_local=False)
    with guard:
        folder.mkdir(parents=True)
        (folder / _HOST).write_text(socket.gethostname(), "utf-8")
        held.acquire()
    try:
        yield folder
    finally:
        held.release()
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(folder: Path) -> None:
    """Delete the folders of `held_folder` whose processes have ended; the caller holds their guard.

    Args:
        folder: Where they are.
    """
    for path in folder.glob(".*.gen2embed-tmp"):
        if is_temporary(path.name) and not path.is_symlink() and (path / HELD).is_file():
            with contextlib.suppress(Timeout, OSError), FileLock(path / HELD, timeout=0):
                own = (path / _HOST).read_text("utf-8") == socket.gethostname()
                if own or path.stat().st_mtime < time.time() - _DAY:
                    shutil.rmtree(path, ignore_errors=True)
