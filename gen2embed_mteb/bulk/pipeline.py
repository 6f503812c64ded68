"""Running batches through a model: some threads open images, one thread prepares, and the caller's runs the model.

A batch that needs too much memory is halved, and so are later batches of that size. A batch that the encoder refuses is
run input by input, to find the input that is at fault.

Cost: at most `LOOKAHEAD` batches, or `MAX_PIXELS_IN_FLIGHT` decoded pixels, wait in memory beside the one that runs.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.shard_checks import NORM_TOLERANCE
from gen2embed_mteb.bulk.store import Shard
from gen2embed_mteb.bulk.types import Fault, StagedEncoder
from gen2embed_mteb.embedder.prompts import Side
from gen2embed_mteb.errors import is_of_the_system, one_line
from gen2embed_mteb.images.errors import ImageError

logger = logging.getLogger(__name__)

LOOKAHEAD = 2  # the number of batches that are opened and prepared while another one is encoded

MAX_PIXELS_IN_FLIGHT = 2**27
"""The most decoded pixels of all batches in work: half a GiB, as Pillow takes four bytes per pixel."""


class Work(NamedTuple):
    """A distinct input: its text, the digests of its images, and paths where these images can be found."""

    text: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs of similar length that are run together."""

    works: tuple[Work, ...]
    num_tokens: int
    """The tokens of all its inputs together, without padding."""
    num_pixels: int = 0
    """The decoded pixels of all its images together: as in their files or as resized, whichever is more."""


@dataclass(frozen=True)
class _Failed:
    fault: Fault


_Row = npt.NDArray[np.float32] | _Failed


class Pipeline:
    """Runs batches on either side, and remembers how large they may be.

    Args:
        encoder: The model.
        open_input: Turns a text and the paths of its images into an input of the encoder.
        num_workers: The number of threads that open images.

    Attributes:
        num_encoded: The number of inputs passed to the model so far.
        num_halvings: The number of times that a batch was halved because memory ran out.
    """

    def __init__(
        self, encoder: StagedEncoder, open_input: Callable[[str, tuple[str, ...]], dict[str, Any]], num_workers: int
    ) -> None:
        """Keep the arguments; no thread is started yet."""
        self.encoder = encoder
        self.open_input = open_input
        self.num_workers = num_workers
        self.token_limit = sys.maxsize
        self.num_encoded = 0
        self.num_halvings = 0

    @contextmanager
    def start(self, side: Side) -> Iterator[Callable[[Sequence[Sequence[Batch]], Any], Iterator[Shard]]]:
        """Start the threads and yield a function that takes the batches of shards and a bar, and yields the shards."""
        stages = _Stages(self, side)
        try:
            yield stages.run
        finally:
            stages.stop()


class _Stages:
    """The threads of a pipeline, on one side."""

    def __init__(self, pipeline: Pipeline, side: Side) -> None:
        self._pipeline, self._side, self._encoder = pipeline, side, pipeline.encoder
        self._openers = ThreadPoolExecutor(pipeline.num_workers, thread_name_prefix="image")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def stop(self) -> None:
        """Stop the threads; tasks that have not begun are dropped."""
        for pool in (self._openers, self._preparer):
            pool.shutdown(cancel_futures=True)

    def run(self, shards: Sequence[Sequence[Batch]], bar: Any) -> Iterator[Shard]:
        """Yield shards in order."""
        ready = self._ahead([batch for shard in shards for batch in shard])
        for shard in shards:
            rows: list[_Row] = []
            halvings = self._pipeline.num_halvings
            for batch in shard:
                entries, prepared = next(ready)
                inputs = [entry for entry in entries if isinstance(entry, dict)]
                tokens = batch.num_tokens * len(inputs) // len(entries)
                made = iter(self._encode(inputs, prepared, tokens))
                rows.extend(next(made) if isinstance(entry, dict) else entry for entry in entries)
                bar.update(batch.num_tokens)
                del entries, prepared, inputs, made  # free the images before the next ones are opened
            yield _as_shard(rows, self._pipeline.num_halvings - halvings)

    def _ahead(self, batches: list[Batch]) -> Iterator[tuple[list[dict[str, Any] | _Failed], Any]]:
        pending: deque[tuple[int, Future[tuple[list[dict[str, Any] | _Failed], Any]]]] = deque()
        in_flight = 0
        for batch in batches:
            # A batch that is larger than the limit runs alone. A batch that was yielded is encoded, and its images are
            # freed, when the generator continues.
            while pending and (len(pending) > LOOKAHEAD or in_flight + batch.num_pixels > MAX_PIXELS_IN_FLIGHT):
                num_pixels, ready = pending.popleft()
                yield ready.result()
                in_flight -= num_pixels
            opened = [self._openers.submit(self._open, work) for work in batch.works]
            pending.append((batch.num_pixels, self._preparer.submit(self._gather, opened)))
            in_flight += batch.num_pixels
        while pending:
            yield pending.popleft()[1].result()

    def _open(self, work: Work) -> dict[str, Any] | _Failed:
        try:
            return self._pipeline.open_input(work.text, work.paths)
        except ImageError as error:
            if is_of_the_system(error):
                raise  # no file descriptor left, or a failing disk: the image may be intact
            return _Failed(Fault(error.file, error.reason))

    def _gather(self, opened: list[Future[dict[str, Any] | _Failed]]) -> tuple[list[dict[str, Any] | _Failed], Any]:
        entries = [future.result() for future in opened]
        return entries, self._prepare([entry for entry in entries if isinstance(entry, dict)])

    def _prepare(self, inputs: list[dict[str, Any]]) -> Any:
        """Return the prepared batch; `None` if there are no inputs; the error if the encoder refuses an input."""
        try:
            return self._encoder.prepare(self._side, inputs) if inputs else None
        except ValueError as error:
            return error

    def _encode(self, inputs: list[dict[str, Any]], prepared: Any, tokens: int) -> list[_Row]:
        """Run one batch; halve it if memory runs out, and run its inputs one by one if the encoder refuses it."""
        if not inputs:
            return []
        pipeline = self._pipeline
        refusal: ValueError | None = None
        if len(inputs) == 1 or tokens <= pipeline.token_limit:
            try:
                if isinstance(prepared, ValueError):
                    raise prepared
                vectors = np.asarray(self._encoder.encode_prepared(self._side, prepared), dtype=np.float32)
                pipeline.num_encoded += len(inputs)
                return _checked(vectors, len(inputs))
            except ValueError as error:
                if len(inputs) == 1:
                    return [_Failed(Fault("", f"refused by the encoder: {one_line(error)}"))]
                refusal = error
            except (RuntimeError, MemoryError) as error:
                # Compare torch.OutOfMemoryError by name, so that torch need not be imported.
                if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") or len(inputs) == 1:
                    raise
                pipeline.token_limit = tokens // 2
                logger.warning(
                    "out of memory at %d inputs of %d tokens: halving such batches from now on; pass --batch_tokens %d",
                    len(inputs),
                    tokens,
                    pipeline.token_limit,
                )
        # Here, outside of the `except` block, the error and the frames that held the failed batch in memory are freed.
        del prepared
        if refusal is not None:
            parts = [self._again([entry], 1) for entry in inputs]
            if all(isinstance(part[0], _Failed) for part in parts):
                raise refusal  # every input fails alone, so the encoder itself is at fault
            return [part[0] for part in parts]
        pipeline.num_halvings += 1
        half = len(inputs) // 2
        first = tokens * half // len(inputs)
        return self._again(inputs[:half], first) + self._again(inputs[half:], tokens - first)

    def _again(self, inputs: list[dict[str, Any]], tokens: int) -> list[_Row]:
        # In the preparer's thread, as always: two threads must not use a tokenizer at the same time.
        return self._encode(inputs, self._preparer.submit(self._prepare, inputs).result(), tokens)


def _checked(vectors: npt.NDArray[np.float32], count: int) -> list[_Row]:
    """Check the shape and the norms of the encoder's answer, and split it into rows."""
    if vectors.ndim != 2 or len(vectors) != count:
        raise TypeError(f"the encoder returned shape {vectors.shape} for {count} inputs; expected ({count}, d)")
    rows: list[_Row] = []
    for vector, norm in zip(vectors, np.linalg.norm(vectors, axis=1).tolist(), strict=True):
        if not np.isfinite(norm):
            rows.append(_Failed(Fault("", "the encoder returned NaN or infinity")))
        elif abs(norm - 1.0) > NORM_TOLERANCE:
            raise TypeError(f"the encoder returned a row of norm {norm:.4f}; normalise its vectors (L2)")
        else:
            rows.append(vector)
    return rows


def _as_shard(rows: list[_Row], num_halvings: int) -> Shard:
    width = next((len(row) for row in rows if not isinstance(row, _Failed)), 0)
    vectors = np.zeros((len(rows), width), np.float32)
    errors: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        if isinstance(row, _Failed):
            errors[number] = (row.fault.file, row.fault.reason)
        else:
            vectors[number] = row
    return Shard(vectors, errors, num_halvings)
