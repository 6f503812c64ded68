"""The errors that a user can fix, with one base class; only these become one line on the terminal.

Every class of ours that reports bad input, a bad setting or an unusable file derives from `Gen2EmbedError`. Any other
exception, of ours or of a library, is a fault in the program and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INTERRUPTED = 130
"""The exit status after Ctrl-C, as in shells (128 + SIGINT)."""
UNUSABLE = 2
"""The exit status for input that cannot be used."""

REPEAT_SECONDS = 5.0
"""The time after which Ctrl-C is repeated, if it had no effect."""
_RETRY_SECONDS = 0.05

GO_ON = "run the same command again"
GO_ON_TRAINING = f"{GO_ON} with --resume_from_checkpoint true"

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
    """An error that the user can fix; the message names the value, the file and the remedy.

    It is a `ValueError`, since Python programs expect this error for a bad value.
    """


def is_of_the_system(error: BaseException) -> bool:
    """Return whether an error is caused by the machine, not by a file: no descriptor or memory left, a failing disk.

    Such an error ends the run. It is never reported as a damaged file, since the file may be intact.

    Args:
        error: Any exception; the exceptions that caused it are checked, too.
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
    The memory address in the `repr` of an object is removed, since it differs in every run.

    Args:
        error: Any exception.
    """
    text = " ".join(_ADDRESS.sub("", str(error)).split()) or type(error).__name__
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in _printable(text))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def full_disk_as_os_error(folder: str | Path) -> Iterator[None]:
    """Convert the errors that safetensors and torch raise on a full disk to an `OSError`.

    Args:
        folder: The folder that the library writes to. To test for space, a megabyte is written there, or in the nearest
            folder above it that exists.

    Raises:
        OSError: The disk is full (`ENOSPC`, `EDQUOT` or `EFBIG`). Any other error stays as it is.
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
    """Return the error number if the disk is full, by the message or by a test; otherwise None."""
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


@contextlib.contextmanager
def _repeated_interrupts() -> Iterator[None]:
    """Repeat Ctrl-C until the block is left.

    Python prints and drops an exception that is raised in a destructor or in the callback of a weak reference. If
    Ctrl-C comes at such a moment, the command would go on as if nobody had interrupted it. Here it is not printed, and
    Ctrl-C is repeated at once. If a library drops it in silence, Ctrl-C is repeated after `REPEAT_SECONDS`. Where
    another part of the program handles one of the two signals, or in a thread, nothing is changed.

    Processes that are forked in the block ignore Ctrl-C, as the terminal sends it to them, too: Python would print a
    traceback if they were about to start or to end.
    """
    free = signal.getsignal(signal.SIGINT) is signal.default_int_handler and hasattr(signal, "setitimer")
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def interrupt(*_: Any) -> None:
        if os.getpid() != owner:  # a process that was forked, as torch's workers: it ends with this one
            return
        signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS)
        raise KeyboardInterrupt

    hook = sys.unraisablehook

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        else:
            hook(dropped)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGALRM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def run_command(name: str, run: Callable[[], Any], *, show_tracebacks: bool = False, go_on: str = GO_ON) -> int:
    """Run a command of the terminal, and turn errors that the user can fix into one line and an exit status.

    After Ctrl-C, a second Ctrl-C ends the process at once, without any clean-up.

    Args:
        name: The command as the user typed it, for the message.
        run: The command; it returns an exit status, or None for 0.
        show_tracebacks: Whether every error keeps its traceback (`--verbose`).
        go_on: How the user can continue after Ctrl-C, or after a full disk.

    Returns:
        The return value of `run`; 2 after a `Gen2EmbedError` or an error of the file system, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows may lack characters of our tables
            stream.reconfigure(errors="backslashreplace")
    try:
        with _repeated_interrupts():
            return int(run() or 0)
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # in the main thread only
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # If Ctrl-C came while code that a library compiled from text was running (as for every dataclass), Python would
        # end by SIGINT, whatever exit status is requested; running another compiled text removes this state.
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
