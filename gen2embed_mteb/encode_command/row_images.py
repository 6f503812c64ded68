"""The images of a table's rows: those with a path where they lie, embedded ones in a folder of ours for a while."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import ImageFacts
from gen2embed_mteb.images.kept_bytes import KEPT_BYTES, KeptBytes
from gen2embed_mteb.images.source import ImageSource

EMBEDDED = "embedded:"
"""The beginning of the path of an image that is embedded in a table; its SHA-256 follows."""


class StoppedError(Gen2EmbedError):
    """A part is read that nobody wants any more."""


class RowImages(ImageSource):
    """The images of a table: those with a path where they lie, embedded ones on the disk until all parts forget them.

    Attributes:
        stop_reading: Set where the part that a thread reads is no longer wanted: `facts` then raises `StoppedError`.

    Args:
        root: The folder or archive of the images with a path; None if there are none.
        scratch: An empty folder of ours for embedded images.
        options: As for `ImageSource`.
    """

    def __init__(self, root: Path | None, scratch: Path, **options: Any) -> None:
        """Check the root."""
        super().__init__(scratch if root is None else root, **options)
        self._scratch = scratch
        self._own_ones()

    def _own_ones(self) -> None:
        """Set what belongs to one process alone."""
        self.stop_reading = threading.Event()
        self._users: Counter[str] = Counter()
        self._changing = threading.Lock()
        self._kept = KeptBytes(2 * KEPT_BYTES)  # of the part in work, and of the next one

    def require_wanted(self) -> None:
        """Raise if what is read is no longer wanted.

        Raises:
            StoppedError: `stop_reading` is set.
        """
        if self.stop_reading.is_set():
            raise StoppedError("the run was stopped")

    def facts(self, path: str) -> ImageFacts:
        """Return the digest and size of an image; see `ImageSource.facts`.

        Raises:
            StoppedError: `stop_reading` is set.
        """
        self.require_wanted()
        return super().facts(path)

    def keep(self, data: bytes, mine: set[str]) -> str:
        """Write an encoded image to the disk, once, and return the path under which `open` finds it.

        Args:
            data: The image's file.
            mine: The images of the part; this one is added.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in mine:
            with self._changing:
                if not self._users[digest]:
                    (self._scratch / digest).write_bytes(data)
                self._users[digest] += 1
            mine.add(digest)
        return EMBEDDED + digest

    def forget(self, mine: set[str]) -> None:
        """Delete the embedded images of a part that no other part has."""
        with self._changing:
            for digest in mine:
                self._users[digest] -= 1
                if not self._users[digest]:
                    (self._scratch / digest).unlink(missing_ok=True)
                    del self._users[digest]
        mine.clear()

    def drop_bytes(self, paths: Iterable[str]) -> None:
        """Let the files of a part go that is done, so that they do not push out those of the next one."""
        self._kept.drop(paths)

    def __getstate__(self) -> dict[str, object]:
        """Leave behind who has which image: only this process keeps and deletes them."""
        own = ("_users", "_changing", "stop_reading")
        return {key: value for key, value in super().__getstate__().items() if key not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore images sent by another process."""
        super().__setstate__(state)
        self._own_ones()

    def read(self, path: str) -> bytes:
        """Read the file of an image, also of an embedded one; see `ImageSource.read`."""
        digest = path.removeprefix(EMBEDDED)
        if digest != path and re.fullmatch("[0-9a-f]{64}", digest):
            return (self._scratch / digest).read_bytes()
        return super().read(path)
