"""Workers for tests of the Ray engine, in processes of their own: a plain encoder that logs its calls, or dies."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from plain_encoder import PlainEncoder

from gen2embed_mteb.distributed.worker import ShardWorker


class LoggingEncoder(PlainEncoder):
    """Appends a line per call to a file, and ends its process without a word at one text."""

    def __init__(self, log: str, delay: float, deadly: str) -> None:
        super().__init__(delay)
        self.log, self.deadly = log, deadly

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()} {len(inputs)}\n")
        if self.deadly in [entry.get("text") for entry in inputs]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._encode(side, inputs)


def open_worker(log: str, delay: float = 0.0, deadly: str = "none") -> ShardWorker:
    return ShardWorker(LoggingEncoder(log, delay, deadly))
