"""The peak memory of this process."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Return the largest amount of memory that this process ever held, in bytes.

    On Linux, `getrusage` may report the peak of the process that started this one instead.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
