"""Batches through a model: `preparation.py` opens and prepares them ahead, the caller's thread runs the model.

A batch for which memory does not suffice is halved, and such batches from then on; one that the encoder refuses is run
input by input, to set aside the one that is at fault.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.preparation import Entry, Failed, InProcesses, InThreads, Preparation, Ready, Work
from gen2embed_mteb.bulk.shard_checks import NORM_TOLERANCE
from gen2embed_mteb.bulk.store import Shard
from gen2embed_mteb.bulk.types import Fault, Opener, SplitEncoder, StagedEncoder
from gen2embed_mteb.bulk.workers import Workers
from gen2embed_mteb.errors import one_line
from gen2embed_mteb.names import Side

logger = logging.getLogger(__name__)

MAX_PIXELS_IN_FLIGHT = 2**27
"""Decoded pixels of all batches that are opened, prepared or encoded at a time: half a GiB in Pillow's four bytes."""


@dataclass(frozen=True)
class Batch:
    """Inputs of like length that are run together."""

    works: tuple[Work, ...]
    num_tokens: int
    """Of all its rows together, padding not counted."""
    num_pixels: int = 0
    """Of all its images together, decoded: as they are in their files or as they are enlarged, whichever is more."""


_Row = npt.NDArray[np.float32] | Failed


class Pipeline:
    """Runs batches on either side, and remembers how large they may be.

    Args:
        encoder: The model.
        opener: Opens images.

    Attributes:
        num_encoded: Inputs handed to the model so far.
        num_halvings: How often a batch was halved because memory ran out.
    """

    def __init__(self, encoder: StagedEncoder, opener: Opener) -> None:
        """Keep the parts; no thread is started yet."""
        self.encoder = encoder
        self.opener = opener
        self.token_limit = sys.maxsize
        self.num_encoded = 0
        self.num_halvings = 0

    def start(self, side: Side, workers: Workers | None = None) -> Stages:
        """Start what prepares inputs of one side; use it in a `with` statement, which ends it.

        Args:
            side: The side.
            workers: Processes that open images and prepare batches; without them, threads of this process do.
        """
        if workers is not None and isinstance(self.encoder, SplitEncoder):
            return Stages(self, side, InProcesses(self.encoder, side, workers))
        return Stages(self, side, InThreads(self.encoder, side, self.opener))


class Stages:
    """The stages of a pipeline, on one side: images are opened and batches prepared ahead, the caller runs the model.

    Args:
        pipeline: The pipeline.
        side: The side.
        preparation: Prepares the batches.
    """

    def __init__(self, pipeline: Pipeline, side: Side, preparation: Preparation) -> None:
        """Keep the parts."""
        self._pipeline, self._side, self._encoder = pipeline, side, pipeline.encoder
        self._preparation = preparation

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the preparation; what it has not begun is dropped."""
        preparation = self._preparation
        del self._preparation  # an error that the encoder raised may still hold this object, which holds the workers
        preparation.end(at_once=kind is not None)

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
                # No name is kept of the images, which are to be gone before the next ones are opened.
                rows.extend(self._rows(next(ready), batch.num_tokens))
                bar.update(batch.num_tokens)
            yield _as_shard(rows, self._pipeline.num_halvings - halvings)

    def _ahead(self, batches: list[Batch]) -> Iterator[Ready]:
        pending: deque[tuple[int, Future[Ready]]] = deque()
        most, in_flight = self._preparation.lookahead, 0
        for batch in batches:
            # A batch that is larger than the limit runs alone. What was yielded is encoded, and let go, when the
            # generator goes on.
            while pending and (len(pending) > most or in_flight + batch.num_pixels > MAX_PIXELS_IN_FLIGHT):
                num_pixels, ready = pending.popleft()
                yield ready.result()
                in_flight -= num_pixels
            pending.append((batch.num_pixels, self._preparation.submit(batch.works)))
            in_flight += batch.num_pixels
        while pending:
            yield pending.popleft()[1].result()

    def _rows(self, ready: Ready, tokens: int) -> list[_Row]:
        """Return the row of each input of a batch."""
        entries, prepared = ready
        inputs = [entry for entry in entries if not isinstance(entry, Failed)]
        made = iter(self._encode(inputs, prepared, tokens * len(inputs) // len(entries)))
        return [entry if isinstance(entry, Failed) else next(made) for entry in entries]

    def _encode(self, inputs: list[Entry], prepared: Any, tokens: int) -> list[_Row]:
        """Run one batch; halves it when memory runs out, and take it apart when the encoder refuses it."""
        if not inputs:
            return []
        pipeline = self._pipeline
        refusal: ValueError | None = None
        if len(inputs) == 1 or tokens <= pipeline.token_limit:
            try:
                if isinstance(prepared, Exception):
                    raise prepared
                vectors = np.asarray(self._encoder.encode_prepared(self._side, prepared), dtype=np.float32)
                pipeline.num_encoded += len(inputs)
                return _checked(vectors, len(inputs))
            except ValueError as error:
                if len(inputs) == 1:
                    return [Failed(Fault("", f"refused by the encoder: {one_line(error)}"))]
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
            if all(isinstance(part[0], Failed) for part in parts):
                raise refusal  # not one odd input: the encoder itself is at fault
            return [part[0] for part in parts]
        pipeline.num_halvings += 1
        half = len(inputs) // 2
        first = tokens * half // len(inputs)
        return self._again(inputs[:half], first) + self._again(inputs[half:], tokens - first)

    def _again(self, inputs: list[Entry], tokens: int) -> list[_Row]:
        return self._rows(self._preparation.again(inputs), tokens)


def _checked(vectors: npt.NDArray[np.float32], count: int) -> list[_Row]:
    """Split the encoder's answer into rows and hold it to its contract."""
    if vectors.ndim != 2 or len(vectors) != count:
        raise TypeError(f"the encoder returned shape {vectors.shape} for {count} inputs; expected ({count}, d)")
    rows: list[_Row] = []
    for vector, norm in zip(vectors, np.linalg.norm(vectors, axis=1).tolist(), strict=True):
        if not np.isfinite(norm):
            rows.append(Failed(Fault("", "the encoder returned NaN or infinity")))
        elif abs(norm - 1.0) > NORM_TOLERANCE:
            raise TypeError(f"the encoder returned a row of norm {norm:.4f}; normalise its vectors (L2)")
        else:
            rows.append(vector)
    return rows


def _as_shard(rows: list[_Row], num_halvings: int) -> Shard:
    width = next((len(row) for row in rows if not isinstance(row, Failed)), 0)
    vectors = np.zeros((len(rows), width), np.float32)
    errors: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Failed):
            errors[number] = (row.fault.file, row.fault.reason)
        else:
            vectors[number] = row
    return Shard(vectors, errors, num_halvings)
