"""Runs Python programs in forks of one process that has the libraries loaded: loading them takes longer than most do.

    with Preloaded() as python:
        done = python.run(["-m", "gen2embed_mteb.cli", "--help"])

A program runs as in a new process, with its own arguments, folder, variables, output and exit status. What libraries
read from variables when they are imported was read before: give these variables to `Preloaded`. Where the start
of a process is what is tested, run a new one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("mteb", "peft", "datasets", "sentence_transformers", "gen2embed_mteb.embedder.model")


class Preloaded:
    """One process with the libraries loaded.

    Args:
        variables: Variables of its environment, beside those of this process.
    """

    def __init__(self, **variables: str) -> None:
        """Start it; it loads while the caller goes on."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env={**environment, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._variables = variables

    def __enter__(self) -> Preloaded:
        """Return this object."""
        return self

    def __exit__(self, *_: Any) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()

    def run(
        self, command: list[str], *, cwd: Path | None = None, check: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program and wait for its end.

        Args:
            command: What would stand behind `python`: `-m MODULE …`, `-c CODE …` or `SCRIPT …`.
            cwd: The folder to run it in.
            check: Whether a status other than 0 is an error.
            variables: Variables of its environment.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self._variables, **variables}
            task = {"command": command, "cwd": str(cwd or Path.cwd()), "env": environment}
            self._process.stdin.write(json.dumps({**task, "out": str(out), "err": str(err)}) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            done = subprocess.CompletedProcess(command, status, out.read_text("utf-8"), err.read_text("utf-8"))
        assert not check or status == 0, done.stderr
        return done


def _serve() -> list[str]:
    """Fork once per line of standard input; returns the command, in the forks only."""
    for name in LIBRARIES:
        __import__(name)
    gc.collect()
    gc.freeze()  # the forks need not look at all of it, nor copy it for that
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.clear()
            os.environ.update(task["env"])
            os.chdir(task["cwd"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(task["out"], os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(task["err"], os.O_WRONLY | os.O_CREAT), 2)
            return list(task["command"])
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()
    sys.exit()


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
    _main(_serve())
