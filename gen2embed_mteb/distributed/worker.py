"""A worker: holds the model and computes one shard at a time. It knows nothing of Ray.

A worker that dies leaves a note in the store's folder that says how far it came. The next worker that gets the same
shard first runs the inputs of the batches in question one by one, and throws these vectors away: if one input kills
workers, the note then says which. The shard itself is always computed from the same batches, so its bytes stay the
same.

Cost above that of a shard in one process: the images are read once more, for their digests; and the pipeline of images
starts anew for each shard, since a worker gets the next shard when it has finished one.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.bulk.engines import PlannedShard
from gen2embed_mteb.bulk.pipeline import Batch, Pipeline, Stages
from gen2embed_mteb.bulk.preparation import Helpers, InThreads
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import DatasetEncoder, Encoder, Opener, staged
from gen2embed_mteb.distributed.shared_folder import require_same_folder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.source import Images
from gen2embed_mteb.names import Side
from gen2embed_mteb.storage.atomic import put


@dataclass(frozen=True)
class StoreSetup:
    """What all shards of one piece of work have in common.

    Attributes:
        directory: The store's folder, as an absolute path.
        identity: The store's identity.
        opener: Opens images.
        num_workers: As for `bulk.preparation.Helpers`.
        dataset: The dataset whose prompts are used; empty for the encoder's usual prompts.
        engine: A name of the engine that sends this, which is equal only for the same engine.
        probe: The name of a file in the folder that the driver wrote.
        token: The content of that file.
    """

    directory: str
    identity: Mapping[str, str]
    opener: Opener
    num_workers: int | None
    dataset: str
    engine: str
    probe: str = ""
    token: str = ""

    def open(self, load: Callable[[], ShardWorker]) -> ShardWorker:
        """Return the worker, prepared for these shards.

        Args:
            load: Returns the worker, with its model.

        Raises:
            Gen2EmbedError: This host sees another folder under the store's name than the driver, or another model.
        """
        require_same_folder(Path(self.directory), self.probe, self.token)  # before a model is loaded
        worker = load()
        worker.prepare(self)
        return worker


class Place(NamedTuple):
    """How far a worker came: the batch in work, and the row in it if inputs are run one by one (otherwise -1)."""

    batch: int
    row: int = -1


@dataclass(frozen=True)
class ShardJob:
    """A shard to compute.

    Attributes:
        side: The side of its inputs.
        planned: The shard.
        note: The name of the file in the store's folder in which the worker notes how far it came.
        suspect: The place at which another worker died with this shard, if any.
    """

    side: Side
    planned: PlannedShard
    note: str
    suspect: Place | None = None


class ShardDone(NamedTuple):
    """A shard that a worker has put into the store: how many inputs went through the model, and halved batches."""

    num_encoded: int
    num_halvings: int


class ShardWorker:
    """Computes shards with one encoder.

    Args:
        encoder: The model.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Keep the model."""
        self._given = encoder
        self._setup: StoreSetup | None = None

    @property
    def encoder(self) -> Encoder:
        """The model."""
        return self._given

    def prepare(self, setup: StoreSetup) -> None:
        """Open the store and the images of the shards that follow.

        Raises:
            Gen2EmbedError: This host sees another folder under the store's name than the driver.
        """
        require_same_folder(Path(setup.directory), setup.probe, setup.token)
        if self._setup is None or self._setup.engine != setup.engine:
            encoder: Encoder | None = self._given
            if setup.dataset:
                encoder = self._given.for_dataset(setup.dataset) if isinstance(self._given, DatasetEncoder) else None
            if encoder is None:
                raise Gen2EmbedError(f"{socket.gethostname()}: its model has no prompts for {setup.dataset}")
            self._pipeline = Pipeline(staged(encoder), setup.opener)
            self._helpers = Helpers(setup.num_workers, setup.opener)
        self._setup, self._store = setup, EmbeddingStore(setup.directory, setup.identity)

    def run(self, job: ShardJob) -> ShardDone:
        """Compute a shard, and put it into the store.

        Raises:
            Gen2EmbedError: An image is not the same on this host as on the driver's.
            ValueError: The encoder refuses every input of a batch.
        """
        setup, planned = self._setup, job.planned
        if setup is None:
            raise RuntimeError("prepare was not called")
        if self._store.get(planned.key, planned.num_rows) is not None:
            return ShardDone(0, 0)  # made by a worker that died between the file and its answer
        note = _Note(Path(setup.directory) / job.note)
        _require_same_images(setup.opener.images, planned)
        workers = self._helpers.for_inputs(self._pipeline.encoder, planned.num_images)
        with self._pipeline.start(job.side, workers) as stages:
            if job.suspect is not None:
                _run_one_by_one(stages, planned.batches, job.suspect.batch, note)
            encoded, halvings = self._pipeline.num_encoded, self._pipeline.num_halvings
            note.write(Place(0))
            shard = next(stages.run([planned.batches], note))
        self._store.put(planned.key, shard)
        note.remove()
        return ShardDone(self._pipeline.num_encoded - encoded, self._pipeline.num_halvings - halvings)


def load_shard_worker(
    arguments: Mapping[str, Any], min_side: int, device: str | None, fingerprint: str, num_threads: int
) -> ShardWorker:
    """Return a worker with a `Gen2Embed` model.

    Args:
        arguments: What `Gen2Embed` takes, without `min_side` and `device`.
        min_side: The shorter side to which small images are enlarged.
        device: The device.
        fingerprint: The fingerprint of the driver's model.
        num_threads: The number of torch's threads; it can change the last bits of vectors on a CPU.

    Raises:
        Gen2EmbedError: The model on this host is not the driver's.
    """
    import torch

    from gen2embed_mteb.embedder.fingerprint import fingerprint as fingerprint_of
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder

    torch.set_num_threads(num_threads)
    model = Gen2Embed(**arguments, min_side=min_side, device=device)
    if (found := fingerprint_of(model)) != fingerprint:
        raise Gen2EmbedError(
            f"{socket.gethostname()} loads another model as {arguments['name_or_path']} than the process that started "
            f"the run (fingerprint {found[:12]}, not {fingerprint[:12]}); give all hosts the same files and packages"
        )
    return ShardWorker(PrefixEncoder(model))


def read_place(path: Path) -> Place | None:
    """Return what the note of a worker says; None if there is none.

    Args:
        path: The note's file.
    """
    try:
        batch, row = json.loads(path.read_bytes())
        return Place(int(batch), int(row))
    except (OSError, ValueError, TypeError):
        return None


class _Note:
    """Notes how far the worker came. It takes the place of a progress bar, which is told of every finished batch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = Place(0)

    def update(self, _tokens: int) -> None:
        self.write(Place(self._place.batch + 1))

    def write(self, place: Place) -> None:
        self._place = place
        put(self._path, json.dumps(place).encode())

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Nothing:
    def update(self, _tokens: int) -> None:
        pass


def _run_one_by_one(stages: Stages, batches: list[Batch], first: int, note: _Note) -> None:
    """Run each input of a batch alone, and of those that were being opened at the same time."""
    for number, batch in enumerate(batches[first : first + InThreads.lookahead + 1], first):
        for row, work in enumerate(batch.works):
            note.write(Place(number, row))
            next(stages.run([[Batch((work,), 0, batch.num_pixels)]], _Nothing()))


def _require_same_images(images: Images, planned: PlannedShard) -> None:
    digests = {
        path: digest
        for batch in planned.batches
        for work in batch.works
        for path, digest in zip(work.paths, work.digests, strict=True)
    }
    for path, digest in digests.items():
        try:
            same = images.facts(path).digest == digest
        except ImageError as error:
            raise _other_image(path, error.reason) from error
        if not same:
            raise _other_image(path, "its content differs")


def _other_image(path: str, reason: str) -> Gen2EmbedError:
    return Gen2EmbedError(
        f"{path} is not the same on {socket.gethostname()} as for the process that started the run ({reason}); put "
        "the images on a file system that all hosts share under the same path (--image_dir, --data_dir)"
    )
