"""The errors that a user can mend, by one base class: only these become one line on the terminal.

Every class of ours that reports bad input, a bad setting or an unusable file derives from `Gen2EmbedError`. Any other
exception, of ours or of a library, is a fault in the program and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
UNUSABLE = 2
"""The exit status for input that cannot be used."""

GO_ON = "run the same command again"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_SYSTEM = frozenset(
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "EAGAIN", "EINTR"),
        *("ENODEV", "ENXIO", "ETIMEDOUT", "EHOSTDOWN", "EREMOTEIO"),
    )
    if hasattr(errno, name)
).union(_NO_SPACE)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")
_PROBE_BYTES = 1 << 20


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


@contextlib.contextmanager
def full_disk_as_os_error(folder: str | Path) -> Iterator[None]:
    """Turn what a library raises on a full disk into the `OSError` that it is; safetensors and torch have their own.

    Args:
        folder: Where the library writes; it, or the nearest folder above it that exists, is asked for a megabyte.

    Raises:
        OSError: With `ENOSPC`, `EDQUOT` or `EFBIG`, where there is no room. Any other error stays as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if (number := _full(error, Path(folder))) is not None:
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise


def _full(error: Exception, folder: Path) -> int | None:
    """Return the number of the error of a full disk; None where the disk has room, and nothing else says that it is
    full.
    """
    said = str(error)
    for number in _NO_SPACE:
        if f"os error {number})" in said or os.strerror(number) in said:
            return number
    folder = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as refused:
        if refused.errno in _NO_SPACE:
            return refused.errno
    return None


def run_command(name: str, run: Callable[[], Any], *, show_tracebacks: bool = False, go_on: str = GO_ON) -> int:
    """Run a command of the terminal, and turn what the user can mend into one line and an exit status.

    After Ctrl-C a second one ends the process at once, whatever it is still tidying up.

    Args:
        name: The command as it was typed, for the message.
        run: The command; it returns an exit status, or None for 0.
        show_tracebacks: Whether every error keeps its traceback (`--verbose`).
        go_on: What to do to go on after Ctrl-C, or after a full disk.

    Returns:
        What `run` returned; 2 after a `Gen2EmbedError` or an error of the file system, 130 after Ctrl-C.
    """
    try:
        return int(run() or 0)
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # in the main thread only
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Where Ctrl-C fell into a text that a library compiled (every dataclass is one), Python would still kill itself
        # by SIGINT in the end, whatever status it is asked for; compiling another text takes the note of that away.
        exec("")  # noqa: S102
        if show_tracebacks:
            raise
        sys.stderr.write(f"\n{name}: interrupted; {go_on} to go on\n")
        return INTERRUPTED
    except (Gen2EmbedError, OSError) as error:
        if show_tracebacks:
            raise
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        remedy = f"; free space on that disk, then {go_on}" if full else ""
        sys.stderr.write(f"{name}: error: {one_line(error)}{remedy}\n")
        return UNUSABLE
