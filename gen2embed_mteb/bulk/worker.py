"""A worker process: opens the images of a batch and prepares the batch, for the process that started it.

`workers.py` starts it and says how; this module is all that it imports before it is told what to do. It ends when its
standard input is closed, hence also when the other process dies, whatever it is doing.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from typing import IO, Any

from gen2embed_mteb.bulk.messages import Arrays, read_message, write_message
from gen2embed_mteb.bulk.types import Expecting, Opener
from gen2embed_mteb.errors import Gen2EmbedError, is_of_the_system, one_line
from gen2embed_mteb.images.errors import ImageError

SETUP = "setup"
"""The name of the array in the first message: an `Opener` and a preparer, pickled by the process that starts this."""


class _Told:
    """Images that say which file they open, so that it is known if its decoder kills the process.

    Attributes:
        files: Files that came with a batch, by path.
    """

    def __init__(self, images: Any, out: IO[bytes]) -> None:
        self._images, self._out = images, out
        self.files: Arrays = {}

    def facts(self, path: str) -> Any:
        return self._images.facts(path)

    def kept_bytes(self, path: str) -> bytes | None:
        return self.files[path].tobytes() if path in self.files else None

    def expect(self, path: str, digest: str, _: bytes | None = None) -> None:
        if isinstance(self._images, Expecting):
            self._images.expect(path, digest, self.kept_bytes(path))

    def open(self, path: str) -> Any:
        write_message(self._out, {"on": path})
        return self._images.open(path)


def main() -> None:
    """Answer messages until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one; it ends this one
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints goes to standard error
    asked: queue.SimpleQueue[tuple[Any, Arrays]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    _, arrays = asked.get()
    try:
        # From the process that started this one, by a pipe that no other process has.
        opener, preparer = pickle.loads(arrays.pop(SETUP).data)  # noqa: S301
        told = _Told(opener.images, out)
        opener = Opener(told, opener.options)
        write_message(out, {"ready": True})
    except Exception:
        write_message(out, {"failed": traceback.format_exc()})
        return
    while True:
        request, told.files = asked.get()
        answer = _answer(opener, preparer, request)
        try:
            write_message(out, *answer)
        except OSError:  # nobody is there to read it
            os._exit(0)


def _listen(asked: queue.SimpleQueue[tuple[Any, Arrays]]) -> None:
    try:
        while True:
            asked.put(read_message(sys.stdin.buffer))
    except BaseException:
        os._exit(0)  # at once: the main thread may be in a decoder


def _answer(opener: Opener, preparer: Any, request: Any) -> tuple[dict[str, Any], Arrays]:
    """Return the faults of a batch's inputs by their numbers, and what was made of the others; or an error."""
    faults: dict[str, tuple[str, str]] = {}
    try:
        inputs = []
        for number, (text, paths, digests) in enumerate(request["works"]):
            try:
                inputs.append(opener(text, paths, digests))
            except ImageError as error:
                if is_of_the_system(error):
                    raise
                faults[str(number)] = error.file, error.reason
        try:
            return {"faults": faults}, preparer(request["arguments"], inputs) if inputs else {}
        except ValueError as error:
            refused = [one_line(error), isinstance(error, Gen2EmbedError)]
            return {"faults": faults, "refused": refused}, {}
    except (OSError, MemoryError, ImageError) as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError | MemoryError):
            found = found.__cause__
        if isinstance(found, OSError):
            name = found.filename if isinstance(found.filename, str) else None
            return {"system": [found.errno, found.strerror or str(found), name]}, {}
        return {"memory": one_line(error)}, {}
    except Exception:
        return {"failed": traceback.format_exc()}, {}
