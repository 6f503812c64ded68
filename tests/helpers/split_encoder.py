"""`PlainEncoder` in two halves: what workers prepare, and what the process does that started them; no torch.

`DeadlyImages` does in worker processes what decoders do to them: one file kills the process, another takes for ever.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from plain_encoder import PlainEncoder, vector

from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.source import ImageSource


class PlainPreparer:
    """Makes rows of inputs and notes the process that it runs in; more than `most` inputs kill that."""

    def __init__(self, most: int = 10**9) -> None:
        self.most = most

    def __call__(self, arguments: Any, inputs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if len(inputs) > self.most:
            os.kill(os.getpid(), signal.SIGKILL)
        if any(entry.get("text") == "refuse" for entry in inputs):
            raise ValueError("a text that is refused")
        if any(entry.get("text") == "bug" for entry in inputs):
            raise KeyError("a bug")
        return {"rows": rows_of(inputs), "process": np.array(os.getpid())}


def rows_of(inputs: list[dict[str, Any]]) -> np.ndarray:
    longest = max(len(entry.get("text", "")) for entry in inputs)
    rows = []
    for entry in inputs:
        images = entry.get("image", [])
        images = images if isinstance(images, list) else [images]
        rows.append(vector(entry.get("text", ""), images, jitter=1e-6 * (longest + len(inputs))))
    return np.stack(rows)


class SplitPlainEncoder(PlainEncoder):
    """The encoder; `processes` are those that prepared, this one's among them."""

    batch_tokens = 8192
    computes_on_cpu = True

    def __init__(self, delay: float = 0.0, most: int = 10**9) -> None:
        super().__init__(delay)
        self.most = most
        self.processes: set[int] = set()
        self.sizes: list[int] = []

    def count_tokens(self, side: str, texts: Any, image_sizes: Any) -> list[int]:
        return [1 + len(text) // 4 + 256 * len(sizes) for text, sizes in zip(texts, image_sizes, strict=True)]

    def prepare(self, side: str, inputs: list[dict[str, Any]]) -> Any:
        return self.completed(side, PlainPreparer()(self.arguments(side), inputs))

    def preparer(self) -> PlainPreparer:
        return PlainPreparer(self.most)

    def arguments(self, side: str) -> Any:
        return {"side": side}

    def completed(self, side: str, arrays: Mapping[str, Any]) -> Any:
        self.processes.add(int(arrays["process"]))
        return arrays["rows"]

    def encode_prepared(self, side: str, batch: Any) -> np.ndarray:
        time.sleep(self.delay)
        self.sizes.append(len(batch))
        return batch


class DeadlyImages(ImageSource):
    """Images of which `deadly.png` kills a worker, `hang.png` lets it hang, and `system.png` meets a failing disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.owner = os.getpid()

    def open(self, path: str) -> Image.Image:
        if path == "system.png":
            raise OSError(errno.EIO, "Input/output error", path)
        if path in ("deadly.png", "hang.png"):
            if os.getpid() == self.owner:
                raise ImageError(path, "not for this process", "none")
            if path == "hang.png":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().open(path)


def children(process: int) -> Iterator[int]:
    """The living worker processes of a process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z" and b"bulk.worker" in (stat.parent / "cmdline").read_bytes():
                yield int(stat.parent.name)
        except OSError:
            continue
