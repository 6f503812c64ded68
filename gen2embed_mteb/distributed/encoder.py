"""An encoder whose vectors are made by the workers of a Ray cluster.

It stands in for the encoder of this process, which counts tokens and makes the few vectors that are asked for one by
one. Bulk encoding sees that it brings an engine, and leaves missing shards to it: batches are cut here, in the same way
as without Ray, so that shards have the same keys and the same bytes. Workers write shards into the store's folder,
which all hosts share; nothing but the inputs' texts and paths, and short answers, goes over Ray.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gen2embed_mteb.bulk.engines import Place as PlaceShard
from gen2embed_mteb.bulk.engines import PlannedShard, shard_bar
from gen2embed_mteb.bulk.store import EmbeddingStore, StoredShard
from gen2embed_mteb.bulk.types import DatasetEncoder, Encoder, Opener, PromptedEncoder, staged
from gen2embed_mteb.distributed.options import EngineOptions
from gen2embed_mteb.distributed.pool import Needs, RayPool, connect
from gen2embed_mteb.distributed.shared_folder import probe_in, wait_until_seen
from gen2embed_mteb.distributed.worker import Place, ShardDone, ShardJob, StoreSetup, read_place
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import Size
from gen2embed_mteb.names import Side
from gen2embed_mteb.storage.atomic import new_token, temporary_of

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

MAX_DEATHS = 5
"""The number of workers that may die with one shard, wherever in it."""
MAX_DEATHS_WITH_INPUT = 2
"""The number of workers that may die while they run the same input alone."""
_TEXT_SHOWN = 80


class RayEncoder:
    """Encodes with the workers of a pool.

    Args:
        encoder: The same model in this process.
        pool: The workers, which are `ShardWorker`s.
        batch_tokens: The number of tokens per call of the model that suits the workers' devices.
        dataset: The dataset whose prompts are used; empty for the usual ones.
    """

    def __init__(self, encoder: Encoder, pool: RayPool, *, batch_tokens: int | None = None, dataset: str = "") -> None:
        """Keep the parts."""
        self._given, self._encoder, self.pool = encoder, staged(encoder), pool
        self._batch_tokens, self._dataset = batch_tokens, dataset
        self.prompts: Mapping[Side, str] = getattr(encoder, "prompts", {})

    @property
    def text_alone(self) -> str:
        """Why no input may have images, for messages; empty if the model takes them."""
        return str(getattr(self._given, "text_alone", ""))

    @property
    def batch_tokens(self) -> int:
        """The number of tokens per call of the model that suits the workers' devices."""
        return self._batch_tokens or self._encoder.batch_tokens

    def for_dataset(self, dataset: str, /) -> PromptedEncoder | None:
        """Return the encoder with the prompts of a dataset; None if the model has none for it."""
        other = self._given.for_dataset(dataset) if isinstance(self._given, DatasetEncoder) else None
        if other is None:
            return None
        return RayEncoder(other, self.pool, batch_tokens=self._batch_tokens, dataset=dataset)

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the lengths of inputs in tokens, as the encoder of this process counts them."""
        return self._encoder.count_tokens(side, texts, image_sizes)

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Any:
        """Prepare inputs in this process."""
        return self._encoder.prepare(side, inputs)

    def encode_prepared(self, side: Side, batch: Any) -> Any:
        """Encode prepared inputs in this process."""
        return self._encoder.encode_prepared(side, batch)

    def encode_query(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode queries in this process."""
        return self._given.encode_query(inputs)

    def encode_document(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode candidates in this process."""
        return self._given.encode_document(inputs)

    def engine(self, store: EmbeddingStore, opener: Opener, num_workers: int | None) -> RayEngine:
        """Return the engine that computes shards with the pool's workers."""
        setup = StoreSetup(
            directory=str(store.directory.absolute()),
            identity=store.identity,
            opener=opener,
            num_workers=num_workers,
            dataset=self._dataset,
            engine=new_token(),
        )
        return RayEngine(self.pool, store, setup)


class RayEngine:
    """Computes missing shards with the workers of a pool; see `bulk.engines.Engine`."""

    def __init__(self, pool: RayPool, store: EmbeddingStore, setup: StoreSetup) -> None:
        """Keep the parts; `setup` lacks its probe."""
        self._pool, self._store, self._setup = pool, store, setup
        self._num_encoded = self._num_halvings = 0

    @property
    def num_encoded(self) -> int:
        """The number of inputs that workers passed to the model, without those of workers that died."""
        return self._num_encoded

    @property
    def num_halvings(self) -> int:
        """The number of times that a batch was halved because memory ran out."""
        return self._num_halvings

    def make(self, side: Side, missing: Sequence[PlannedShard], label: str, place: PlaceShard) -> None:
        """Compute shards with the workers; see `Engine.make`.

        Raises:
            Gen2EmbedError: A host does not see the same folders, or workers die with the same input.
        """
        folder = Path(self._setup.directory)
        jobs = [_ShardInWork(side, planned, folder) for planned in missing]
        try:
            with probe_in(folder) as probe, shard_bar(missing, label, place) as (bar, placed):

                def look() -> None:
                    bar.set_description_str(self._pool.state.after(label), refresh=False)
                    probe.keep()

                setup = dataclasses.replace(self._setup, probe=probe.name, token=probe.token)
                for job, answer in self._pool.run(setup, jobs, look, num_jobs=len(jobs)):
                    done: ShardDone = answer
                    self._num_encoded += done.num_encoded
                    self._num_halvings += done.num_halvings
                    bar.update(job.planned.num_tokens)
                    placed(job.planned, self._await(job.planned))
        finally:
            for job in jobs:
                job.note.unlink(missing_ok=True)

    def _await(self, planned: PlannedShard) -> StoredShard:
        return wait_until_seen(
            lambda: self._store.get(planned.key, planned.num_rows),
            self._store.directory,
            f"the shard {planned.key[:32]}",
        )


class _ShardInWork:
    """A job of the pool: a shard, and what is known of the workers that died with it."""

    def __init__(self, side: Side, planned: PlannedShard, folder: Path) -> None:
        self.side, self.planned = side, planned
        self.note = temporary_of(folder / f"{planned.key[:32]}.note", new_token())
        self._deaths: list[Place | None] = []

    def payload(self) -> ShardJob:
        suspect = next((place for place in reversed(self._deaths) if place is not None), None)
        return ShardJob(self.side, self.planned, self.note.name, suspect)

    def died(self) -> None:
        place = read_place(self.note)
        self._deaths.append(place)
        self.note.unlink(missing_ok=True)
        if place is not None and place.row >= 0 and self._deaths.count(place) >= MAX_DEATHS_WITH_INPUT:
            self._refuse(place, MAX_DEATHS_WITH_INPUT, "this input, run alone")
        if len(self._deaths) >= MAX_DEATHS:
            self._refuse(place or Place(0), MAX_DEATHS, "inputs of the same shard, at last in the batch of this input")

    def _refuse(self, place: Place, count: int, what: str) -> None:
        batches = self.planned.batches
        work = batches[min(place.batch, len(batches) - 1)].works[max(place.row, 0)]
        text = work.text if len(work.text) <= _TEXT_SHOWN else work.text[:_TEXT_SHOWN] + "…"
        images = f" with {', '.join(work.paths)}" if work.paths else ""
        raise Gen2EmbedError(
            f"{count} workers died with {what}: {self.side} {text!r}{images}. See Ray's logs for the reason (lack of "
            "memory, for instance); take the row out of the data, or pass a smaller --batch_tokens"
        )


class Loading(Protocol):
    """How a model was loaded; `config.ModelOptions`."""

    @property
    def model_name(self) -> str:
        """Hub id, directory or short name."""

    @property
    def layout(self) -> str | None:
        """How an image stands in the prompt."""

    @property
    def pooling(self) -> str | None:
        """How a vector is made of states."""

    def arguments(self) -> dict[str, Any]:
        """Return the other arguments of `Gen2Embed`."""


@contextmanager
def encoder_of_model(config: EngineOptions, model: Gen2Embed, options: Loading, fingerprint: str) -> Iterator[Encoder]:
    """Yield the encoder that bulk encoding uses: of this process, or one whose vectors a Ray cluster makes.

    Args:
        config: Where vectors are made.
        model: The model in this process.
        options: How it was loaded, from which workers load it, too.
        fingerprint: Its fingerprint, which is compared with that of each worker's model.

    Raises:
        Gen2EmbedError: Ray is not installed, or no cluster can be reached.
    """
    from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder, batch_tokens_on

    encoder = PrefixEncoder(model)
    if config.engine != "ray":
        yield encoder
        return
    import torch

    arguments = {"name_or_path": options.model_name, "layout": options.layout, "pooling": options.pooling}
    arguments |= options.arguments()
    given = arguments.pop("device")
    ray, own = connect(config.ray_address)
    try:
        needs, device = needs_of(given, torch.get_num_threads(), ray.cluster_resources())
        of_worker = {
            "arguments": arguments,
            "min_side": model.image_options.min_side,
            "device": device,
            "fingerprint": fingerprint,
            "num_threads": torch.get_num_threads(),
        }
        pool = RayPool(ray, "gen2embed_mteb.distributed.worker:load_shard_worker", of_worker, needs, config.num_actors)
        try:
            yield RayEncoder(encoder, pool, batch_tokens=batch_tokens_on(device))
        finally:
            logger.info("shards by worker:\n%s", pool.state.table())
            pool.close()
    finally:
        if own:
            ray.shutdown()


def needs_of(device: str | None, num_threads: int, resources: Mapping[str, float]) -> tuple[Needs, str]:
    """Return what a worker needs, and its device: a GPU if one was asked for, or if the cluster has any.

    Args:
        device: The device that was asked for, such as `cuda:1`; a worker sees one GPU only, so its number is dropped.
        num_threads: The number of torch's threads of a worker without GPU, each of which gets a CPU.
        resources: The resources of the cluster.
    """
    kind = device.partition(":")[0] if device else "cuda" if resources.get("GPU", 0) >= 1 else "cpu"
    return (Needs(num_gpus=1), "cuda") if kind == "cuda" else (Needs(num_cpus=num_threads), kind)
