"""Workers for tests of the Ray engine, in processes of their own: a plain encoder that logs its calls, or dies."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from plain_encoder import PlainEncoder

from gen2embed_mteb.distributed.worker import ShardWorker


class LoggingEncoder(PlainEncoder):
    """Appends a line per call to a file, waits while another file exists, and ends its process at one text."""

    def __init__(self, log: str, delay: float, deadly: str, hold: str) -> None:
        super().__init__(delay)
        self.log, self.deadly, self.hold = log, deadly, hold

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()} {len(inputs)}\n")
        if self.deadly in [entry.get("text") for entry in inputs]:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 300
        while self.hold and Path(self.hold).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return super()._encode(side, inputs)


def open_worker(log: str, delay: float = 0.0, deadly: str = "none", hold: str = "") -> ShardWorker:
    return ShardWorker(LoggingEncoder(log, delay, deadly, hold))
