"""A process of `torchrun` ends when its launcher is gone; otherwise it would keep its GPU, and write on.

`torchrun` stops its processes when it is asked to end. Killed outright, by a memory limit or a job manager, it
cannot: they are left to themselves.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping

ORPHANED = 143
"""The exit status of a process whose launcher is gone: as if the launcher had ended it (128 + SIGTERM)."""
INTERVAL = 1.0
"""Seconds between two looks."""


def end_with_launcher(environment: Mapping[str, str] | None = None) -> bool:
    """End this process soon after its launcher is gone, where `torchrun` started it; elsewhere do nothing.

    A process that a shell started stays: `nohup` and a job's script outlive their shells on purpose.

    Args:
        environment: By default `os.environ`; `torchrun` and `accelerate launch` set TORCHELASTIC_RUN_ID.

    Returns:
        Whether the launcher is watched.
    """
    if "TORCHELASTIC_RUN_ID" not in (os.environ if environment is None else environment):
        return False
    threading.Thread(target=_watch, args=(os.getppid(),), name="gen2embed-launcher", daemon=True).start()
    return True


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(INTERVAL)
    try:
        sys.stderr.write(f"gen2embed: the launcher (process {launcher}) is gone; this process ends\n")
        sys.stderr.flush()
    finally:  # also where the terminal is gone
        os._exit(ORPHANED)
