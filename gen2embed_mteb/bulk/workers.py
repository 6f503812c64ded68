"""Worker processes that open images and prepare batches, so that a GPU need not wait for one thread.

1. A worker is a new Python that runs `worker.py`, joined to this process by two pipes. Neither is it a fork, which
   threads and CUDA do not bear, nor does it import the user's program, so that a script needs no `__main__` guard.
2. It gets once, pickled, what opens images and what prepares batches; then batches, as JSON, and returns arrays.
3. One thread of this process waits for each worker. Batches are handed out in order, and their futures keep it.
4. A worker that is killed, crashes, or takes longer than the limit is replaced. Its batch is prepared again input by
   input; one with which alone two workers end is set aside as a fault of that input; the others are one batch again.
5. Workers run in process groups of their own, so that Ctrl-C reaches this process alone, which ends them at once. They
   end by themselves when their standard input is closed, hence also when this process is killed.

Cost: a worker imports what the preparer needs, some seconds and 400 MB for `Gen2Embed`; arrays pass through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from gen2embed_mteb.bulk.messages import Arrays, read_message, write_message
from gen2embed_mteb.bulk.types import Expecting, Fault, Opener, Preparer
from gen2embed_mteb.bulk.worker import SETUP
from gen2embed_mteb.errors import Gen2EmbedError, one_line

logger = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds after which a worker counts as hanging on its batch, and is ended."""

_BOOT = """import json, sys
sys.path[:] = json.loads(sys.stdin.buffer.readline())
from gen2embed_mteb.bulk.worker import main
main()"""
# One core for each worker; and none of them may take memory of a GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

Input = tuple[str, tuple[str, ...], tuple[str, ...]]
"""A text, the paths of its images, and their digests."""


class Answer(NamedTuple):
    """What became of a batch.

    Attributes:
        faults: The inputs that cannot be used, by their places.
        prepared: Arrays of the others, empty if there are none; or the error with which the preparer refused them.
    """

    faults: dict[int, Fault]
    prepared: Arrays | Exception


class WorkersError(Gen2EmbedError):
    """The error for workers that cannot be used at all; the message says why, and how to do without."""


class _Lost(Exception):
    """A worker ended while it had a batch.

    Attributes:
        file: The image that it was opening or had opened last; empty if none.
    """

    def __init__(self, reason: str, file: str) -> None:
        super().__init__(reason)
        self.file = file


class _Stopped(Exception):
    """The workers were stopped while a batch was prepared."""


class Workers:
    """Worker processes, started when the first batch is prepared; they end with `stop`, and with this object.

    Args:
        count: How many.
        opener: Opens images.
        preparer: Prepares batches.
        patience: Seconds after which a worker counts as hanging.
    """

    def __init__(self, count: int, opener: Opener, preparer: Preparer, *, patience: float = PATIENCE) -> None:
        """Keep the parts; no process is started yet."""
        self.count = count
        self._parts = opener, preparer
        self._patience = patience
        self._crew: _Crew | None = None
        self._ending: weakref.finalize | None = None

    def start(self) -> None:
        """Start the processes, unless they run, and wait until one of them is ready.

        Raises:
            WorkersError: They cannot be started, or what they need cannot be sent to them.
        """
        if self._crew is None:
            crew = self._crew = _Crew(self.count, *self._parts, self._patience)
            self._ending = weakref.finalize(self, crew.stop)
        try:
            self._crew.ready()
        except BaseException:
            self.stop()
            raise

    def submit(self, works: Sequence[Input], arguments: Any) -> Future[Answer]:
        """Prepare a batch, after those that were submitted before, if workers are busy.

        Args:
            works: The inputs.
            arguments: What the preparer is to know.
        """
        if self._crew is None:
            raise RuntimeError("not started")
        return self._crew.pool.submit(self._crew.prepare, works, arguments)

    def stop(self) -> None:
        """End the processes at once; `start` starts others."""
        self._crew = None
        if self._ending is not None:
            self._ending()


class _Crew:
    """The processes that run at a time; once stopped, they are not started again."""

    def __init__(self, count: int, opener: Opener, preparer: Preparer, patience: float) -> None:
        try:
            self._setup = np.frombuffer(pickle.dumps((opener, preparer), protocol=5), np.uint8)
        except Exception as error:  # whatever an object's own methods raise
            raise _unusable(f"what prepares inputs cannot be sent to them ({one_line(error)})") from error
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._images, self._patience = opener.images, patience
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._owner, self._stopped = os.getpid(), False

    def ready(self) -> None:
        """Wait until a worker is ready."""
        started = [self.pool.submit(self._touch) for _ in range(self._idle.qsize())]
        if started:
            started[0].result()

    def _touch(self) -> None:
        worker = self._idle.get()
        try:
            worker = worker or self._begin()
        finally:
            self._idle.put(worker)

    def prepare(self, works: Sequence[Input], arguments: Any) -> Answer:
        """Prepare a batch, whatever happens to workers."""
        try:
            return self._ask(works, arguments)
        except _Lost as lost:
            again = "it is tried again" if len(works) == 1 else f"its {len(works)} inputs are tried one by one"
            logger.warning("%s, at %s; %s", lost, lost.file or repr(works[0][0][:80]), again)
        faults: dict[int, Fault] = {}
        alone: dict[int, Answer] = {}
        for number, work in enumerate(works):
            try:
                alone[number] = self._ask_twice([work], arguments)
            except _Lost as lost:
                files = lost.file or (work[1][0] if work[1] else "")
                logger.warning("%s again, at %s; this input is set aside", lost, files or repr(work[0][:80]))
                faults[number] = Fault(files, str(lost))
        if len(alone) == 1:
            ((place, answer),) = alone.items()
            return Answer(faults | ({place: answer.faults[0]} if answer.faults else {}), answer.prepared)
        try:
            answer = self._ask([works[number] for number in alone], arguments)
        except _Lost as lost:
            # Every input went through alone: together they need more memory than there is.
            return Answer(faults, MemoryError(f"{lost}, with {len(alone)} inputs that can be prepared one by one"))
        places = list(alone)
        return Answer(faults | {places[number]: fault for number, fault in answer.faults.items()}, answer.prepared)

    def _ask_twice(self, works: Sequence[Input], arguments: Any) -> Answer:
        """Ask once more if a worker ends: one that lack of memory or a user kills proves nothing about an input."""
        with contextlib.suppress(_Lost):
            return self._ask(works, arguments)
        return self._ask(works, arguments)

    def _ask(self, works: Sequence[Input], arguments: Any) -> Answer:
        if not works:
            return Answer({}, {})
        worker = self._idle.get()
        try:
            worker = worker or self._begin()
            value, arrays = worker.ask({"works": works, "arguments": arguments}, self._kept(works), self._patience)
        except BaseException:
            if worker is not None:
                self._end(worker)
            worker = None
            if self._stopped:
                raise _Stopped from None
            raise
        finally:
            self._idle.put(worker)
        return _answer(value, arrays)

    def _kept(self, works: Sequence[Input]) -> Arrays:
        """Return the files of images that this process still has."""
        files: Arrays = {}
        if isinstance(self._images, Expecting):
            for path in {path for work in works for path in work[1]}:
                data = self._images.kept_bytes(path)
                if data is not None:
                    files[path] = np.frombuffer(data, np.uint8)
        return files

    def _begin(self) -> _Worker:
        with self._lock:
            if self._stopped:
                raise _Stopped
            worker = _Worker()
            self._running.add(worker)
        try:
            worker.set_up(self._setup)
        except BaseException:
            self._end(worker)
            raise
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.end()
        with self._lock:
            self._running.discard(worker)

    def stop(self) -> None:
        """End all processes at once."""
        if os.getpid() != self._owner:  # a fork of the process that they belong to
            return
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for worker in running:
            worker.kill()
        self.pool.shutdown(wait=threading.current_thread() is threading.main_thread(), cancel_futures=True)
        for worker in running:
            self._end(worker)


class _Worker:
    """One process and its two pipes."""

    def __init__(self) -> None:
        if not sys.executable:
            raise _unusable("this program does not know its Python")
        # Windows knows no process groups of this kind, and ignores the argument.
        self._process = subprocess.Popen(  # noqa: S603  # this Python, and no word of a user
            [sys.executable, "-P", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **_ENVIRONMENT},
            process_group=0 if os.name == "posix" else None,
        )
        self._hanging = False
        _enlarge(self._process.stdout)

    def set_up(self, setup: Any) -> None:
        """Tell the process what to do, and wait until it has loaded that."""
        try:
            self._write(json.dumps(sys.path).encode() + b"\n")
            write_message(self._process.stdin, None, {SETUP: setup})  # type: ignore[arg-type]
            value, _ = self._wait("", PATIENCE)
        except (_Lost, OSError) as error:
            raise _unusable(f"a worker process could not be started ({self._ending() or one_line(error)})") from error
        if "failed" in value:
            raise _unusable(f"a worker process cannot load what it needs ({value['failed'].strip().splitlines()[-1]})")

    def ask(self, request: Any, files: Arrays, patience: float) -> tuple[Any, Arrays]:
        """Send a batch, with the files that need not be read again, and wait for what becomes of it."""
        try:
            write_message(self._process.stdin, request, files)  # type: ignore[arg-type]
        except OSError:
            raise _Lost(self._ending(), "") from None
        return self._wait("", patience)

    def _wait(self, file: str, patience: float) -> tuple[Any, Arrays]:
        timer = threading.Timer(patience, self._give_up)
        timer.start()
        try:
            while True:
                value, arrays = read_message(self._process.stdout)  # type: ignore[arg-type]
                if "on" not in value:
                    return value, arrays
                file = value["on"]
        except (EOFError, OSError, ValueError):
            reason = f"preparing it took longer than {patience:g} s" if self._hanging else self._ending()
            raise _Lost(reason, file) from None
        finally:
            timer.cancel()

    def _write(self, data: bytes) -> None:
        self._process.stdin.write(data)  # type: ignore[union-attr]

    def _give_up(self) -> None:
        self._hanging = True
        self.kill()

    def _ending(self) -> str:
        """Wait for the process's end, and say what ended it; the same in every run."""
        self.kill(unless_ended=1.0)
        status = self._process.wait()
        try:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        except ValueError:
            name = f"signal {-status}"
        return f"the process that prepared it ended by {name}"

    def kill(self, unless_ended: float = 0.0) -> None:
        """End the process by force, unless it ends by itself within some seconds."""
        try:
            self._process.wait(unless_ended)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def end(self) -> None:
        """End the process, and close its pipes."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _enlarge(pipe: Any) -> None:
    """Let a pipe hold a megabyte where the system can do that (Linux): fewer switches between the two processes."""
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def _answer(value: Any, arrays: Arrays) -> Answer:
    """Return what a worker made of a batch; raise the error that it met, if it is none of an input's."""
    if "system" in value:
        number, reason, file = value["system"]
        raise OSError(number, reason, file) if file else OSError(number, reason)
    if "memory" in value:
        raise MemoryError(value["memory"])
    if "failed" in value:
        raise RuntimeError(f"in a worker process:\n{value['failed']}")
    faults = {int(number): Fault(*fault) for number, fault in value["faults"].items()}
    if "refused" in value:
        reason, ours = value["refused"]
        return Answer(faults, Gen2EmbedError(reason) if ours else ValueError(reason))
    return Answer(faults, arrays)


def _unusable(reason: str) -> WorkersError:
    return WorkersError(f"{reason}; pass --num_workers 0 to prepare inputs in this process")


def cores_per_process() -> int:
    """Return how many cores each process of this run has; torchrun says how many processes there are on this host."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(said) if said.isdigit() else 1))
