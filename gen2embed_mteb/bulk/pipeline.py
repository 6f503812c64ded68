"""Batches through a model: threads open images, one thread prepares, the caller's runs the model.

A batch for which memory does not suffice is halved, and such batches from then on; one that the encoder refuses is run
input by input, to set aside the one that is at fault.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.shard_checks import NORM_TOLERANCE
from gen2embed_mteb.bulk.store import Shard
from gen2embed_mteb.bulk.types import Fault, StagedEncoder
from gen2embed_mteb.errors import is_of_the_system, one_line
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.names import Side

logger = logging.getLogger(__name__)

LOOKAHEAD = 2  # batches that are opened and prepared while another one is encoded

MAX_PIXELS_IN_FLIGHT = 2**27
"""Decoded pixels of all batches that are opened, prepared or encoded at a time: half a GiB in Pillow's four bytes."""


class Work(NamedTuple):
    """A distinct input: its text and the digests of its images; the paths are one way to reach them."""

    text: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs of like length that are run together."""

    works: tuple[Work, ...]
    num_tokens: int
    """Of all its rows together, padding not counted."""
    num_pixels: int = 0
    """Of all its images together, decoded: as they are in their files or as they are enlarged, whichever is more."""


@dataclass(frozen=True)
class _Failed:
    fault: Fault


_Row = npt.NDArray[np.float32] | _Failed


class Pipeline:
    """Runs batches on either side, and remembers how large they may be.

    Args:
        encoder: The model.
        open_input: Opens an input: its text and the paths of its images, into what the encoder takes.
        num_workers: Threads that open images.

    Attributes:
        num_encoded: Inputs handed to the model so far.
        num_halvings: How often a batch was halved because memory ran out.
    """

    def __init__(
        self, encoder: StagedEncoder, open_input: Callable[[str, tuple[str, ...]], dict[str, Any]], num_workers: int
    ) -> None:
        """Keep the parts; no thread is started yet."""
        self.encoder = encoder
        self.open_input = open_input
        self.num_workers = num_workers
        self.token_limit = sys.maxsize
        self.num_encoded = 0
        self.num_halvings = 0

    def start(self, side: Side) -> Stages:
        """Start the threads that encode inputs of one side; use it in a `with` statement, which ends them."""
        return Stages(self, side)


class Stages:
    """The threads of a pipeline, on one side: some open images, one prepares batches, the caller's runs the model."""

    def __init__(self, pipeline: Pipeline, side: Side) -> None:
        """Start the threads."""
        self._pipeline, self._side, self._encoder = pipeline, side, pipeline.encoder
        self._openers = ThreadPoolExecutor(pipeline.num_workers, thread_name_prefix="image")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads; what they have not begun is dropped."""
        for pool in (self._openers, self._preparer):
            pool.shutdown(cancel_futures=True)

    def run(self, shards: Sequence[Sequence[Batch]], bar: Any) -> Iterator[Shard]:
        """Encode shards in order.

        Args:
            shards: The batches of each shard.
            bar: A progress bar that counts tokens.

        Yields:
            A shard for each.
        """
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
                del entries, prepared, inputs, made  # the images, before the next ones are opened
            yield _as_shard(rows, self._pipeline.num_halvings - halvings)

    def _ahead(self, batches: list[Batch]) -> Iterator[tuple[list[dict[str, Any] | _Failed], Any]]:
        pending: deque[tuple[int, Future[tuple[list[dict[str, Any] | _Failed], Any]]]] = deque()
        in_flight = 0
        for batch in batches:
            # A batch that is larger than the limit runs alone. What was yielded is encoded, and let go, when the
            # generator goes on.
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
                raise  # no descriptor left, a failing disk: the picture may be whole
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
        """Run one batch; halves it when memory runs out, and take it apart when the encoder refuses it."""
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
                # torch.OutOfMemoryError by name: torch is not imported for this.
                if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") or len(inputs) == 1:
                    raise
                pipeline.token_limit = tokens // 2
                logger.warning(
                    "out of memory at %d inputs of %d tokens: halving such batches from now on; pass --batch_tokens %d",
                    len(inputs),
                    tokens,
                    pipeline.token_limit,
                )
        # Out here the error is gone, and with it the frames that held the failed batch in memory.
        del prepared
        if refusal is not None:
            parts = [self._again([entry], 1) for entry in inputs]
            if all(isinstance(part[0], _Failed) for part in parts):
                raise refusal  # not one odd input: the encoder itself is at fault
            return [part[0] for part in parts]
        pipeline.num_halvings += 1
        half = len(inputs) // 2
        first = tokens * half // len(inputs)
        return self._again(inputs[:half], first) + self._again(inputs[half:], tokens - first)

    def _again(self, inputs: list[dict[str, Any]], tokens: int) -> list[_Row]:
        # In the preparer's thread, as always: tokenizers are not made for two at a time.
        return self._encode(inputs, self._preparer.submit(self._prepare, inputs).result(), tokens)


def _checked(vectors: npt.NDArray[np.float32], count: int) -> list[_Row]:
    """Split the encoder's answer into rows and hold it to its contract."""
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
