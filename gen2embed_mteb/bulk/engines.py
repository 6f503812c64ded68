"""Engines: what computes the shards that a store lacks, in this process or elsewhere.

A shard depends on its inputs alone, not on who computes it or when. So an engine may compute the missing shards in any
order and anywhere, as long as each of them is in the store in the end. `LocalEngine` computes them in this process and
shares them with the other processes of `torchrun`; `gen2embed_mteb.distributed` has an engine on a Ray cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from gen2embed_mteb.bulk.pipeline import Batch, Pipeline
from gen2embed_mteb.bulk.preparation import Helpers
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.progress import token_bar
from gen2embed_mteb.bulk.store import EmbeddingStore, StoredShard
from gen2embed_mteb.bulk.types import Opener
from gen2embed_mteb.names import Side


@dataclass(frozen=True)
class PlannedShard:
    """A shard that is to be computed: its number among all shards of the run, its key in the store, and its work."""

    number: int
    key: str
    batches: list[Batch]

    @property
    def num_rows(self) -> int:
        """The number of its inputs."""
        return sum(len(batch.works) for batch in self.batches)

    @property
    def num_images(self) -> int:
        """The number of their images."""
        return sum(len(work.paths) for batch in self.batches for work in batch.works)

    @property
    def num_tokens(self) -> int:
        """The number of their tokens, padding not counted."""
        return sum(batch.num_tokens for batch in self.batches)


Place = Callable[[PlannedShard, StoredShard], None]
"""Takes a shard that was computed, or found in the store meanwhile."""


class Engine(Protocol):
    """Computes missing shards."""

    @property
    def num_encoded(self) -> int:
        """The number of inputs that were passed to the model so far."""

    @property
    def num_halvings(self) -> int:
        """The number of times that a batch was halved because memory ran out."""

    def make(self, side: Side, missing: Sequence[PlannedShard], label: str, place: Place) -> None:
        """Compute shards, or wait for those that other processes compute.

        Args:
            side: The side of their inputs.
            missing: The shards.
            label: The name of this piece of work in the progress bar.
            place: Is called once for each shard, as soon as it is in the store.

        Raises:
            ValueError: The encoder refuses every input of a batch; the error is the encoder's own.
        """


@runtime_checkable
class EngineEncoder(Protocol):
    """An encoder that brings an engine of its own, which computes its shards elsewhere."""

    def engine(self, store: EmbeddingStore, opener: Opener, num_workers: int | None) -> Engine:
        """Return an engine.

        Args:
            store: The store of the shards.
            opener: Opens images.
            num_workers: As for `Helpers`, in each process that computes.
        """


class LocalEngine:
    """Computes this process's share of the shards, and waits for the shares of other processes.

    Args:
        pipeline: The model, and what opens its inputs.
        helpers: The processes that prepare inputs, where they pay.
        store: The store of the shards, which all processes share.
        share: The part of the work that belongs to this process.
        peers: The other processes.
    """

    def __init__(self, pipeline: Pipeline, helpers: Helpers, store: EmbeddingStore, share: Share, peers: Peers) -> None:
        """Keep the parts."""
        self._helpers = helpers
        self._pipeline, self._store, self._share, self._peers = pipeline, store, share, peers

    @property
    def num_encoded(self) -> int:
        """The number of inputs that were passed to the model so far."""
        return self._pipeline.num_encoded

    @property
    def num_halvings(self) -> int:
        """The number of times that a batch was halved because memory ran out."""
        return self._pipeline.num_halvings

    def make(self, side: Side, missing: Sequence[PlannedShard], label: str, place: Place) -> None:
        """Compute this process's share of the missing shards, and wait for the others; see `Engine.make`."""
        own = [planned for planned in missing if self._share.owns(planned.number)]
        workers = self._helpers.for_inputs(self._pipeline.encoder, sum(planned.num_images for planned in own))
        with (
            shard_bar(missing, label, place, silent=self._share.rank > 0) as (bar, placed),
            self._pipeline.start(side, workers) as stages,
        ):
            for planned, shard in zip(own, stages.run([shard.batches for shard in own], bar), strict=True):
                placed(planned, self._store.put(planned.key, shard))
            others = {planned.key: planned for planned in missing if not self._share.owns(planned.number)}
            numbers = {key: planned.number for key, planned in others.items()}
            for key, found in self._peers.await_others(numbers, lambda key: self._store.get(key, others[key].num_rows)):
                planned = others[key]
                if found is not None:
                    bar.update(planned.num_tokens)
                    placed(planned, found)
                    continue
                for shard in stages.run([planned.batches], bar):
                    placed(planned, self._store.put(key, shard))


@contextmanager
def shard_bar(
    missing: Sequence[PlannedShard], label: str, place: Place, *, silent: bool = False
) -> Iterator[tuple[Any, Place]]:
    """Yield a progress bar over the tokens of shards, and a `place` that also shows the items per second in it.

    Args:
        missing: The shards.
        label: What the bar is called.
        place: Takes each shard.
        silent: Whether nothing is shown.
    """
    started, rows = time.monotonic(), 0
    with token_bar(sum(planned.num_tokens for planned in missing), label, silent=silent) as bar:

        def placed(planned: PlannedShard, shard: StoredShard) -> None:
            nonlocal rows
            place(planned, shard)
            rows += shard.num_rows
            bar.set_postfix_str(f"{rows / (time.monotonic() - started):.1f} items/s", refresh=False)

        yield bar, placed
