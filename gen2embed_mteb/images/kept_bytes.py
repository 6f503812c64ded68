"""The bytes of image files that were read last, up to a limit, so that small data is read once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

KEPT_BYTES = 2**28
"""The most bytes that a source of images keeps: a quarter of a GiB."""


class KeptBytes:
    """Files by name, of which the one that was used longest ago goes first; several threads may use it.

    Args:
        limit: The most bytes of all files together; a larger file is not kept.
    """

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        """Keep nothing yet."""
        self._limit, self._total = limit, 0
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, name: str, data: bytes) -> None:
        """Keep a file, in place of an earlier one of the same name."""
        with self._lock:
            self._total -= len(self._files.pop(name, b""))
            if len(data) > self._limit:
                return
            self._files[name] = data
            self._total += len(data)
            while self._total > self._limit:
                self._total -= len(self._files.popitem(last=False)[1])

    def get(self, name: str) -> bytes | None:
        """Return a file, if it is still kept."""
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
            return self._files.get(name)

    def drop(self, names: Iterable[str]) -> None:
        """Let some files go; names that are not kept cost nothing."""
        with self._lock:
            for name in names:
                self._total -= len(self._files.pop(name, b""))
