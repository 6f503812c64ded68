"""Ending a process of `torchrun` when its launcher has ended; otherwise it would keep its GPU and continue to write.

`torchrun` stops its processes when it is asked to end. If it is killed, by a memory limit or a job manager, it cannot
stop them, and they would continue.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping

ORPHANED = 143
"""The exit status of a process whose launcher has ended, as if the launcher had stopped it (128 + SIGTERM)."""
INTERVAL = 1.0
"""Seconds between two checks."""


def end_with_launcher(environment: Mapping[str, str] | None = None) -> bool:
    """End this process soon after its launcher has ended, if `torchrun` started it; otherwise do nothing.

    A process that a shell started continues: `nohup` and the script of a job outlive their shells on purpose.

    Args:
        environment: The environment variables, by default `os.environ`; `torchrun` and `accelerate launch` set
            TORCHELASTIC_RUN_ID.

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
    finally:  # even if the terminal was closed
        os._exit(ORPHANED)
