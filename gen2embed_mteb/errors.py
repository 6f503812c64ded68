"""The errors that a user can mend, by one base class: only these become one line on the terminal.

Every class of ours that reports bad input, a bad setting or an unusable file derives from `Gen2EmbedError`. Any other
exception, of ours or of a library, is a fault in the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from typing import Any

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
UNUSABLE = 2
"""The exit status for input that cannot be used."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_SYSTEM = frozenset(
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "EAGAIN", "EINTR"),
        *("ENODEV", "ENXIO", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO"),
    )
    if hasattr(errno, name)
).union(_NO_SPACE)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")


class Gen2EmbedError(ValueError):
    """Something that the user can mend; the message names the value, the file and the remedy.

    It is a `ValueError`, since that is what Python programs expect of a bad value.
    """


def is_of_the_system(error: BaseException) -> bool:
    """Say whether an error tells of the machine, not of the file: no descriptor left, no memory, a failing disk.

    Such an error ends the run. It is never reported as a damaged file, since the file may be whole.

    Args:
        error: Any exception; the ones it was raised from are looked at, too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno in _OF_THE_SYSTEM):
            return True
        seen = seen.__cause__
    return False


def one_line(error: BaseException) -> str:
    r"""Return the message of an error as one line of text that any terminal can print.

    Line breaks and control characters become blanks. Lone surrogates, which no encoding can print, become `\udXXX`.
    The memory address in the `repr` of an object is left out: it differs from run to run.

    Args:
        error: Any exception.
    """
    text = " ".join(_ADDRESS.sub("", str(error)).split()) or type(error).__name__
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in _printable(text))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def run_command(name: str, run: Callable[[], Any], *, show_tracebacks: bool = False) -> int:
    """Run a command of the terminal, and turn what the user can mend into one line and an exit status.

    Args:
        name: The command as it was typed, for the message.
        run: The command; it returns an exit status, or None for 0.
        show_tracebacks: Whether every error keeps its traceback (`--verbose`).

    Returns:
        What `run` returned; 2 after a `Gen2EmbedError` or an error of the file system, 130 after Ctrl-C.
    """
    try:
        return int(run() or 0)
    except KeyboardInterrupt:
        if show_tracebacks:
            raise
        sys.stderr.write(f"\n{name}: interrupted; run the same command again to go on\n")
        return INTERRUPTED
    except (Gen2EmbedError, OSError) as error:
        if show_tracebacks:
            raise
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        remedy = "; free space on that disk, then run the same command again" if full else ""
        sys.stderr.write(f"{name}: error: {one_line(error)}{remedy}\n")
        return UNUSABLE
