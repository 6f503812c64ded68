"""A pool of workers on a Ray cluster that do jobs until all are done, whatever happens to single workers.

1. As many workers are started as the cluster has places for, each in a process of its own with a GPU, or with a number
   of CPUs, that no other worker has. Places of nodes that join later are used too.
2. Each worker has one job at a time. So a worker that dies costs at most the job that it was doing.
3. The job of a worker that died is given to another one, and a new worker is started. A job may refuse: it is told of
   each death (`Job.died`), and raises an error when it is at fault itself.

Jobs must be idempotent: one whose worker died between the work and the answer is done again. Workers die with this
process. Ray sends no usage statistics unless RAY_USAGE_STATS_ENABLED says so.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from gen2embed_mteb.distributed.host import Host
from gen2embed_mteb.errors import Gen2EmbedError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Seconds between two looks at the cluster's nodes, while no worker finishes anything."""
PATIENCE = 600.0
"""Seconds after which a run without any place for a worker ends."""
MAX_FAILED_STARTS = 3
"""The number of workers, one after another, that may die before they are ready."""
MAX_DEATHS = 3
"""The number of workers that may die with one `CountedJob`."""
_PASSED_ON = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_PASSED_PREFIX = "GEN2EMBED_"


class Job(Protocol):
    """A piece of work."""

    def payload(self) -> Any:
        """Return what is sent to the worker."""

    def died(self) -> None:
        """Take notice that a worker died with this job; raise a `Gen2EmbedError` if it shall not be tried again."""


AnyJob = TypeVar("AnyJob", bound=Job)
Work = TypeVar("Work")


class CountedJob(Generic[Work]):
    """A job that is given up when `MAX_DEATHS` workers died with it.

    Args:
        work: What is sent to the worker.
        advice: What follows "3 workers died" in the message.
    """

    def __init__(self, work: Work, advice: str) -> None:
        """Keep the arguments."""
        self.work, self._advice, self._deaths = work, advice, 0

    def payload(self) -> Work:
        """Return the work."""
        return self.work

    def died(self) -> None:
        """Count a death; see `Job.died`."""
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            raise Gen2EmbedError(f"{self._deaths} workers died {self._advice}")


@dataclass(frozen=True)
class Needs:
    """What each worker needs of the cluster."""

    num_cpus: int = 1
    num_gpus: int = 0

    def places(self, resources: Mapping[str, float]) -> int:
        """Return how many workers have room on a node.

        Args:
            resources: The node's resources, as Ray names them.
        """
        places = int(resources.get("CPU", 0)) // self.num_cpus
        return min(places, int(resources.get("GPU", 0)) // self.num_gpus) if self.num_gpus else places

    def __str__(self) -> str:
        gpus = f"{self.num_gpus} GPU and " if self.num_gpus else ""
        return f"{gpus}{self.num_cpus} CPU{'s' if self.num_cpus > 1 else ''}"


@dataclass
class _Worker:
    actor: Any
    where: str = ""
    """Host and process; empty until it has been ready once."""


@dataclass
class PoolState:
    """How the pool stands, for the progress bar and the log.

    Attributes:
        num_ready: The number of workers that are ready.
        num_lost: The number of workers that died.
        done: The number of jobs that each worker has done, by host and process.
    """

    num_ready: int = 0
    num_lost: int = 0
    done: dict[str, int] = field(default_factory=dict)

    def after(self, label: str) -> str:
        """Return a label of a progress bar with the number of workers."""
        lost = f", {self.num_lost} lost" if self.num_lost else ""
        return f"{label} ({self.num_ready} workers{lost})"

    def table(self) -> str:
        """Return the jobs of each worker as lines of text."""
        lines = [f"  {where:<40} {count:>8,} jobs" for where, count in sorted(self.done.items())]
        return "\n".join([*lines, f"  {self.num_lost} of the workers died"])


class RayPool:
    """Workers on a Ray cluster.

    Args:
        ray: The module, connected to a cluster (`connect`).
        factory: What makes a worker in its process, as `module:function`.
        arguments: The arguments of that function.
        needs: What each worker needs.
        num_actors: The number of workers; None stands for as many as there are places.
    """

    def __init__(
        self,
        ray: Any,
        factory: str,
        arguments: Mapping[str, Any],
        needs: Needs,
        num_actors: int | None = None,
    ) -> None:
        """Keep the arguments; workers start with the first jobs."""
        self._ray, self._needs, self._num_actors = ray, needs, num_actors
        # A lost worker is replaced by a new one, which Ray may put on another node.
        self._kind = ray.remote(num_cpus=needs.num_cpus, num_gpus=needs.num_gpus, max_restarts=0)(Host)
        environment = {
            name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith(_PASSED_PREFIX)
        }
        environment |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # there is one bar, the driver's
        self._arguments = (factory, dict(arguments), environment, str(Path.cwd()))
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._looked = self._without_place = 0.0
        self._places = 0
        self.state = PoolState()

    def run(
        self, setup: Any, jobs: Iterable[AnyJob], on_look: Callable[[], None], *, num_jobs: int
    ) -> Iterator[tuple[AnyJob, Any]]:
        """Let the workers do jobs.

        Args:
            setup: What every worker is prepared with before its first of these jobs.
            jobs: The jobs; they are taken when a worker is free.
            on_look: Is called before workers are started, at least once per `POLL_SECONDS`.
            num_jobs: The number of jobs.

        Yields:
            Each job with the worker's answer, in the order in which they are done.

        Raises:
            Gen2EmbedError: The cluster has no place for a worker, workers die before they are ready, or a job ends it.
            Exception: What a worker raised.
        """
        ray, left, again = self._ray, iter(jobs), deque[AnyJob]()
        shared = ray.put(setup)
        busy: dict[Any, tuple[_Worker, AnyJob | None]] = {}
        for worker in self._workers:
            busy[worker.actor.prepare.remote(shared)] = worker, None
        idle: list[_Worker] = []
        num_open, num_waiting = num_jobs, num_jobs
        self._without_place, self._looked = time.monotonic(), 0.0
        while num_open:
            on_look()
            for worker in self._started(num_open):
                busy[worker.actor.prepare.remote(shared)] = worker, None
            while num_waiting and idle:
                worker, job = idle.pop(), again.popleft() if again else next(left)
                num_waiting -= 1
                busy[worker.actor.run.remote(job.payload())] = worker, job
            ready, _ = ray.wait(list(busy), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                worker, given = busy.pop(reference)
                answer = self._answer(reference, worker, given)
                if answer is _DIED:
                    again.extend([] if given is None else [given])
                    num_waiting += given is not None
                    continue
                idle.append(worker)
                if given is not None:
                    num_open -= 1
                    self.state.done[worker.where] = self.state.done.get(worker.where, 0) + 1
                    yield given, answer

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()
        self.state.num_ready = 0

    def _answer(self, reference: Any, worker: _Worker, job: Job | None) -> Any:
        """Return what a worker answers, or `_DIED`."""
        kinds = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        except kinds.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, Exception) else error) from None
        except (
            kinds.RayActorError,
            kinds.OutOfMemoryError,
            kinds.NodeDiedError,
            kinds.WorkerCrashedError,
        ) as error:
            self._lost(worker, error)
            if job is not None:
                job.died()
            return _DIED
        if job is None:
            self._failed_starts = 0
            self.state.num_ready += not worker.where
            if not worker.where:
                logger.info("worker %s is ready (%d of them)", answer, self.state.num_ready)
            worker.where = answer
        return answer

    def _lost(self, worker: _Worker, error: Exception) -> None:
        self._workers.remove(worker)
        self._ray.kill(worker.actor)  # it may only be out of reach, and would take the place of another
        self.state.num_lost += 1
        if worker.where:
            self.state.num_ready -= 1
            logger.warning("worker %s died; what it was doing is done again by another", worker.where)
            return
        self._failed_starts += 1
        reason = " ".join(str(error).split())
        if self._failed_starts >= MAX_FAILED_STARTS:
            raise Gen2EmbedError(
                f"{self._failed_starts} workers died before they were ready ({reason}); is there enough memory for "
                f"one model per {self._needs}? Pass fewer --num_actors, or see Ray's logs"
            )
        logger.warning("a worker died before it was ready (%s)", reason)

    def _started(self, num_open: int) -> list[_Worker]:
        """Start the workers that are missing, and return them."""
        if time.monotonic() - self._looked >= POLL_SECONDS:
            self._looked = time.monotonic()
            alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._places = sum(self._needs.places(resources) for resources in alive)
            self._check_place(alive)
        # One waits even where there is no place: a cluster that grows by itself gets a node for it.
        wanted = min(self._num_actors or max(1, self._places), num_open)
        started = [_Worker(self._kind.remote(*self._arguments)) for _ in range(wanted - len(self._workers))]
        self._workers += started
        return started

    def _check_place(self, alive: list[Mapping[str, float]]) -> None:
        now = time.monotonic()
        if self._places:
            self._without_place = now
        if now - self._without_place > PATIENCE:
            found = [", ".join(f"{node.get(kind, 0):g} {kind}s" for kind in ("GPU", "CPU")) for node in alive]
            raise Gen2EmbedError(
                f"no node of the Ray cluster has room for a worker, which needs {self._needs}; the nodes have "
                f"{'; '.join(found) or 'nothing'}. Set OMP_NUM_THREADS to fewer threads, or add nodes"
            )


_DIED = object()


def connect(address: str) -> tuple[Any, bool]:
    """Connect to a Ray cluster.

    Args:
        address: The cluster's address; empty for RAY_ADDRESS, the cluster that runs on this host, or a new one.

    Returns:
        The module `ray`, and whether this call connected it, so that the caller shall disconnect it.

    Raises:
        Gen2EmbedError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise Gen2EmbedError("ray is not installed: pip install 'gen2embed[ray]'") from error
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address or None, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise Gen2EmbedError(
            f"no Ray cluster can be used at {address or 'this host'} ({' '.join(str(error).split())}); start one with "
            "'ray start --head', and pass its address as --ray_address"
        ) from error
    return ray, True
