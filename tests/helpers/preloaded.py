"""Runs Python programs in forks of a process that has the libraries loaded: loading them takes longer than most do.

    python = Preloaded(folder)
    done = python.run(["-m", "gen2embed_mteb.cli", "--help"])

A program runs as in a new process, with its own arguments, folder, variables, output and exit status. What libraries
read from variables when they are imported was read before; of those, the number of threads and the caches of `datasets`
are read again. Where the start of a process is what is tested, run a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = {
    "ours": ("mteb", "peft", "datasets", "sentence_transformers", "gen2embed_mteb.embedder.model"),
    "stock": ("peft", "sentence_transformers"),
}
"""What the two kinds of processes have loaded; those of the second kind know nothing of Gen2Embed."""


_IDLE = 10.0
"""Seconds after which a process ends to which nobody has connected."""


class Preloaded:
    """A process with the libraries loaded, shared by all that name the same folder; the last to leave ends it.

    Args:
        folder: Where they find each other.
        kind: One of `LIBRARIES`.
    """

    def __init__(self, folder: Path, kind: str = "ours") -> None:
        """Find it, or start it; it loads while the caller goes on."""
        from filelock import FileLock

        self._note = folder / f"preloaded-{kind}"
        with FileLock(f"{self._note}.lock"):  # under which the process ends, too
            try:
                self._stay = self._connected()
            except OSError:
                place = tempfile.mkdtemp(prefix="preloaded-")  # the system limits the length of a socket's path
                self._note.write_text(f"{place}/socket")
                _start(place, kind, f"{self._note}.lock")
                self._stay = self._connected()

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(self._note.read_text())
        except OSError:
            made.close()
            raise
        return made

    def __enter__(self) -> Preloaded:
        """Return this object."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Leave it."""
        self._stay.close()

    def start(self, command: list[str], *, cwd: Path | None = None, **variables: str | None) -> Program:
        """Start a program.

        Args:
            command: What would stand behind `python`: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
            cwd: The folder to run it in.
            variables: Variables of its environment; None takes one away.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
        kept = {name: value for name, value in environment.items() if value is not None}
        return Program(self._connected(), {"command": command, "cwd": str(cwd or Path.cwd()), "env": kept})

    def run(
        self, command: list[str], *, cwd: Path | None = None, check: bool = False, **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Start a program and wait for its end.

        Args:
            command: As for `start`.
            cwd: As for `start`.
            check: Whether a status other than 0 is an error.
            variables: As for `start`.
        """
        done = self.start(command, cwd=cwd, **variables).wait()
        assert not check or done.returncode == 0, done.stderr
        return done


class Program:
    """A program that runs.

    Attributes:
        pid: Its process.
    """

    def __init__(self, connection: socket.socket, task: dict[str, Any]) -> None:
        """Have it started."""
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._folder.name, "out"), Path(self._folder.name, "err")
        self._command = task["command"]
        self._lines = connection.makefile("rw")
        self._connection = connection
        self._lines.write(json.dumps({**task, "out": str(self._out), "err": str(self._err)}) + "\n")
        self._lines.flush()
        said = self._lines.readline()
        assert said, "the process with the libraries has died; what it said stands above"
        self.pid = int(said)
        self._done: subprocess.CompletedProcess[str] | None = None

    def ended(self) -> bool:
        """Whether it has ended."""
        if self._done is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._connection, selectors.EVENT_READ)
                if ready.select(0):
                    self.wait()
        return self._done is not None

    def kill(self) -> None:
        """Kill it, if it runs, and wait for that."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end; returns its status and what it printed."""
        if self._done is None:
            status = int(self._lines.readline())
            printed = [path.read_text("utf-8", "replace") if path.exists() else "" for path in (self._out, self._err)]
            self._done = subprocess.CompletedProcess(self._command, status, *printed)
            self._lines.close()
            self._connection.close()
            self._folder.cleanup()
        return self._done


def _start(place: str, kind: str, lock: str) -> None:
    """Start the process that loads and forks, and return when it listens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT)} if kind == "ours" else {"PYTHONPATH": "", "GEN2EMBED_NO_HOOK": "1"}
    environment["PYTHONHASHSEED"] = another_hash_seed()
    command = [sys.executable, "-P", __file__, place, kind, lock]
    # It outlives this process where another one uses it, hence no pipe but for its first word.
    started = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "listens\n"
    started.stdout.close()
    started.returncode = 0  # nobody waits for it


def another_hash_seed() -> str:
    """A seed of Python's hashes that this process does not have."""
    return "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"


def _serve(place: str, kind: str, lock: str) -> list[str]:
    """Fork once per line that a connection sends; returns the command, in the forks only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when nobody is connected any more
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{place}/socket")
    listener.listen(64)
    os.write(1, b"listens\n")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in LIBRARIES[kind]:
        __import__(name)
    gc.collect()
    gc.freeze()  # the forks need not look at all of it, nor copy it for that
    wake, waker = socket.socketpair()
    for end in (wake, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    ready.register(wake, selectors.EVENT_READ)
    stays: dict[socket.socket, int | None] = {}  # connections, and the programs that run for them
    while True:
        for key, _ in ready.select(None if stays else _IDLE):
            asked = key.fileobj
            assert isinstance(asked, socket.socket)
            if asked is listener:
                made = listener.accept()[0]
                stays[made] = None
                ready.register(made, selectors.EVENT_READ)
            elif asked is wake:
                with contextlib.suppress(BlockingIOError):
                    wake.recv(4096)
                for each, child in list(stays.items()):
                    if child is not None and (found := os.waitpid(child, os.WNOHANG))[0]:
                        stays[each] = None
                        with contextlib.suppress(OSError):
                            each.sendall(f"{os.waitstatus_to_exitcode(found[1])}\n".encode())
            elif line := _line(asked):
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    os.setsid()
                    ready.close()
                    for each in (listener, wake, waker, *stays):
                        each.close()
                    return _become(json.loads(line))
                stays[asked] = child
                with contextlib.suppress(OSError):  # the client has left: the next round sees it
                    asked.sendall(f"{child}\n".encode())
            else:
                ready.unregister(asked)
                asked.close()
                if (child := stays.pop(asked)) is not None:  # nobody waits for it any longer
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)  # with its own children
                    os.waitpid(child, 0)
        if not stays:
            _end_unless_joined(ready, place, lock)


def _end_unless_joined(ready: selectors.BaseSelector, place: str, lock: str) -> None:
    """End this process, unless somebody joins just now, who has the lock."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
        if not ready.select(0):
            Path(place, "socket").unlink()
            Path(place).rmdir()
            os._exit(0)


def _line(connection: socket.socket) -> bytes:
    """The line that a connection sends, or nothing where it was closed."""
    found = b""
    while not found.endswith(b"\n"):
        try:
            part = connection.recv(65536)
        except OSError:  # it was left with something unread
            return b""
        if not part:
            return b""
        found += part
    return found


def _become(task: dict[str, Any]) -> list[str]:
    """Take over the folder, the variables and the output of a program; returns its command."""
    os.environ.clear()
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    os.dup2(os.open(task["out"], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(task["err"], os.O_WRONLY | os.O_CREAT), 2)
    sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "HF_DATASETS_CACHE" in os.environ and "datasets.config" in sys.modules:
        importlib.reload(sys.modules["datasets.config"])
    return list(task["command"])


def _main(command: list[str]) -> None:
    """Run a command and end as Python does, but leave the libraries' objects to the system: that saves two seconds."""
    status = 1
    try:
        _run(command)
        status = 0
    except SystemExit as ending:
        if isinstance(ending.code, str):
            sys.stderr.write(ending.code + "\n")
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(command: list[str]) -> None:
    kind, *words = command
    if kind == "-m":
        sys.argv = words
        sys.path.insert(0, str(Path.cwd()))
        sys.modules.pop(words[0], None)  # one that is loaded already would be run twice, with a warning
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.path.insert(0, "")
        exec(compile(words[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _main(_serve(*sys.argv[1:]))
