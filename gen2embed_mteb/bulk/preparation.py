"""Batches are opened and prepared ahead of the model: by threads of this process, or by worker processes.

Both give the same batches in the same order, hence the same vectors to the bit; both set aside inputs that cannot be
opened. Threads suffice for texts, and on a CPU, where the model takes far longer than its inputs. A GPU would wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from gen2embed_mteb.bulk.types import Fault, Opener, SplitEncoder, StagedEncoder
from gen2embed_mteb.bulk.workers import Answer, Workers, WorkersError, cores_per_process
from gen2embed_mteb.errors import is_of_the_system
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.names import Side

logger = logging.getLogger(__name__)

THREADS = 4
"""Threads that open images where no worker processes do."""
MOST_WORKERS, IMAGES_THAT_PAY = 4, 1000
"""Where nobody said how many workers: the most, and for how many images the seconds that they take to start pay."""


class Work(NamedTuple):
    """A distinct input: its text and the digests of its images; the paths are one way to reach them."""

    text: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """An input that has no vector."""

    fault: Fault


Entry = Any
"""An input that can be used: what the opener returned, or where it is opened elsewhere its `Work`."""


class Ready(NamedTuple):
    """A batch that is ready for the model.

    Attributes:
        entries: Its inputs in order, each as an `Entry` or as `Failed`.
        prepared: What the encoder made of the entries; `None` if there are none; the error if it refuses them.
    """

    entries: list[Entry | Failed]
    prepared: Any


class Preparation(Protocol):
    """Prepares batches of one side."""

    lookahead: int
    """How many batches are prepared while another one is encoded."""

    def submit(self, works: Sequence[Work]) -> Future[Ready]:
        """Open and prepare a batch."""

    def again(self, entries: Sequence[Entry]) -> Ready:
        """Prepare some entries of an earlier batch, and wait for them."""

    def end(self, *, at_once: bool) -> None:
        """End what runs for this side; `at_once` after an error, and what is shared with other sides, too."""


class InThreads:
    """Some threads open images, and one prepares: tokenizers are not made for two at a time.

    Args:
        encoder: The model.
        side: The side of the inputs.
        opener: Opens images.
    """

    lookahead = 2

    def __init__(self, encoder: StagedEncoder, side: Side, opener: Opener) -> None:
        """Start the threads."""
        self._encoder, self._side, self._opener = encoder, side, opener
        self._openers = ThreadPoolExecutor(THREADS, thread_name_prefix="image")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def submit(self, works: Sequence[Work]) -> Future[Ready]:
        """Open and prepare a batch."""
        opened = [self._openers.submit(self._open, work) for work in works]
        return self._preparer.submit(self._gather, opened)

    def again(self, entries: Sequence[Entry]) -> Ready:
        """Prepare entries that were opened before."""
        return Ready(list(entries), self._preparer.submit(self._prepare, list(entries)).result())

    def end(self, *, at_once: bool) -> None:
        """End the threads; what they have not begun is dropped."""
        for pool in (self._openers, self._preparer):
            pool.shutdown(cancel_futures=True)

    def _open(self, work: Work) -> Entry | Failed:
        try:
            return self._opener(work.text, work.paths, work.digests)
        except ImageError as error:
            if is_of_the_system(error):
                raise  # no descriptor left, a failing disk: the picture may be whole
            return Failed(Fault(error.file, error.reason))

    def _gather(self, opened: list[Future[Entry | Failed]]) -> Ready:
        entries = [future.result() for future in opened]
        return Ready(entries, self._prepare([entry for entry in entries if not isinstance(entry, Failed)]))

    def _prepare(self, inputs: list[dict[str, Any]]) -> Any:
        try:
            return self._encoder.prepare(self._side, inputs) if inputs else None
        except ValueError as error:
            return error


class InProcesses:
    """Worker processes open images and prepare; a thread of this process completes what each returns.

    Args:
        encoder: The model.
        side: The side of the inputs.
        workers: The processes; they go on for other sides and datasets of the same model.
    """

    def __init__(self, encoder: SplitEncoder, side: Side, workers: Workers) -> None:
        """Start the processes, unless they run."""
        self._encoder, self._side, self._workers = encoder, side, workers
        self.lookahead = max(InThreads.lookahead, workers.count + 1)
        self._arguments = encoder.arguments(side)
        workers.start()
        self._completer = ThreadPoolExecutor(workers.count, thread_name_prefix="prepare")

    def submit(self, works: Sequence[Work]) -> Future[Ready]:
        """Open and prepare a batch."""
        answer = self._workers.submit([(work.text, work.paths, work.digests) for work in works], self._arguments)
        return self._completer.submit(self._complete, list(works), answer)

    def again(self, entries: Sequence[Entry]) -> Ready:
        """Open and prepare once more."""
        return self.submit(entries).result()

    def end(self, *, at_once: bool) -> None:
        """End the threads, and the processes if it is to be at once."""
        if at_once:
            self._workers.stop()
        self._completer.shutdown(cancel_futures=True)

    def _complete(self, works: list[Work], future: Future[Answer]) -> Ready:
        answer = future.result()
        entries = [Failed(answer.faults[n]) if n in answer.faults else work for n, work in enumerate(works)]
        prepared: Any = answer.prepared
        if not isinstance(prepared, Exception):
            prepared = self._encoder.completed(self._side, prepared) if len(answer.faults) < len(works) else None
        return Ready(entries, prepared)


class Helpers:
    """The worker processes of a bulk encoder, started when there is work for which they pay.

    Args:
        num_workers: How many; 0: none; `None`: some where the model runs on a GPU and many images are to be opened.
        opener: Opens images.
    """

    def __init__(self, num_workers: int | None, opener: Opener) -> None:
        """Keep the parts."""
        self._num_workers, self._opener = num_workers, opener
        self._workers: Workers | None = None

    def for_inputs(self, encoder: StagedEncoder, num_images: int) -> Workers | None:
        """Return running workers, or `None` where the threads of this process are to prepare.

        Args:
            encoder: The model; workers serve all datasets of one model.
            num_images: How many images are to be opened.

        Raises:
            WorkersError: A number of workers was asked for, and they cannot be started.
        """
        count = self._num_workers
        if count == 0 or num_images == 0 or not isinstance(encoder, SplitEncoder):
            return None
        if count is None:
            count = min(MOST_WORKERS, cores_per_process() - 1)
            if encoder.computes_on_cpu or count < 1 or (self._workers is None and num_images < IMAGES_THAT_PAY):
                return None
        try:
            if self._workers is None:
                self._workers = Workers(count, self._opener, encoder.preparer())
            self._workers.start()
        except WorkersError as error:
            if self._num_workers is not None:
                raise
            logger.warning("%s; threads of this process prepare the inputs", error)
            self._num_workers = 0
            return None
        return self._workers
