"""Encoding many inputs: every distinct input once, in batches sorted by length, with all vectors stored on disk.

1. Inputs that are already known, from this call or an earlier one, are dropped: a candidate that a thousand rows or two
   datasets share is encoded once per side. Images are compared by the bytes of their files, not by name.
2. The other inputs are sorted by length in tokens, prompt and images included, longest first, so that a lack of memory
   shows at once. They are cut into batches of similar lengths with at most `batch_tokens` tokens, and the batches are
   grouped into shards. The cut is a pure function of the inputs: an interrupted run that is started again forms the
   same batches, hence the same vectors to the bit.
3. Shards found in the store are reused. An engine computes the others (`engines.py`): each process its share, batch by
   batch, while threads or worker processes open and prepare the next batches (`preparation.py`), after which it waits
   for the other processes' shares (`processes.py`); or the workers of a Ray cluster.

An encoder may have prompts of its own for each dataset (`for_dataset`). Then the same input has another vector in
another dataset: inputs are compared only within the datasets of the same prompts, and a shard's key has the prompt.

An input whose image cannot be opened, or that the encoder refuses even alone, is recorded with its reason.

Cost: an image file is read for its digest and size, and to encode it; once for both if the images are few, and digests
of many are remembered (`image_facts.py`). Each distinct input goes through the model once. Vectors stay on disk; memory
holds the batches in work, a quarter of a GiB of files, and an index of all distinct inputs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.engines import Engine, EngineEncoder, LocalEngine, PlannedShard
from gen2embed_mteb.bulk.image_facts import FactsReader
from gen2embed_mteb.bulk.pipeline import MAX_PIXELS_IN_FLIGHT, Batch, Pipeline
from gen2embed_mteb.bulk.preparation import Helpers, Work
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.store import EmbeddingStore, StoredShard, StoreMismatchError
from gen2embed_mteb.bulk.types import DatasetEncoder, Encoder, Fault, Item, Opener, staged
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import ImageFacts, Size
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.images.source import Images
from gen2embed_mteb.names import Side

BATCHES_PER_SHARD = 16
MAX_PADDING, NEGLIGIBLE_PADDING = 0.1, 128
"""A batch ends before more than this fraction of it, and more than this number of tokens, would be padding."""


class BulkEncoder:
    """Encodes items on both sides and remembers where their vectors are.

    Args:
        encoder: The model; with a `StagedEncoder` such as `PrefixEncoder`, inputs are sorted by its own count of
            tokens, and batches are prepared ahead.
        store: The store of the shards.
        images: The source of the images.
        batch_tokens: The most tokens per call of the model, padding included; an input that is longer runs alone. None
            stands for the encoder's own number.
        batch_size: The most inputs per call of the model.
        image_options: How images are resized.
        num_workers: Processes that open images and prepare batches of them; 0: threads of this process do; None: some
            if the model runs on a GPU and the images are many. The vectors are the same to the bit.
        share: The part of the work that belongs to this process; by default all of it.

    """

    def __init__(
        self,
        encoder: Encoder,
        store: EmbeddingStore,
        images: Images,
        *,
        batch_tokens: int | None = None,
        batch_size: int = 512,
        image_options: ImageOptions | None = None,
        num_workers: int | None = 0,
        share: Share | None = None,
    ) -> None:
        """Keep the arguments; nothing is read yet."""
        self._given, self._encoder = encoder, staged(encoder)
        self._store = store
        self._batch_tokens = batch_tokens or self._encoder.batch_tokens
        self._batch_size = batch_size
        self._image_options = image_options or ImageOptions()
        self._opener = Opener(images, self._image_options)
        self._num_workers = num_workers
        self._helpers = Helpers(num_workers, self._opener)
        self._share = share or Share()
        self._peers = Peers(self._share)
        self._reader = FactsReader(images, self._image_options, store.directory, self._share, self._peers)
        self._engine = self._open_engine()
        self._shards: list[StoredShard] = []
        self._places: dict[tuple[Side, str, tuple[str, ...]], tuple[int, int]] = {}
        self._facts: dict[str, ImageFacts | Fault] = {}
        self._num_reused = 0
        self._prompts: dict[Side, str] = {}
        self._of_datasets: dict[tuple[tuple[Side, str], ...], BulkEncoder] = {}

    def for_dataset(self, dataset: str) -> BulkEncoder:
        """Return the bulk encoder for the items of a dataset, whose vectors are made with the dataset's prompts.

        Args:
            dataset: The dataset's name.

        Returns:
            This object, unless the encoder has prompts for the dataset; the same object for datasets with the same
            prompts. It shares the store, what is known of images, and the counts with this one, but no vectors.
        """
        other = self._given.for_dataset(dataset) if isinstance(self._given, DatasetEncoder) else None
        if other is None:
            return self
        prompts = tuple(sorted(other.prompts.items()))
        found = self._of_datasets.get(prompts)
        if found is None:
            found = self._of_datasets[prompts] = copy.copy(self)
            found._given, found._encoder, found._prompts = other, staged(other), dict(prompts)
            found._engine = found._open_engine()
            found._shards, found._places, found._of_datasets, found._num_reused = [], {}, {}, 0
        return found

    @property
    def num_reused(self) -> int:
        """The number of inputs whose vectors came from the store, in all datasets."""
        return self._num_reused + sum(other.num_reused for other in self._of_datasets.values())

    @property
    def num_encoded(self) -> int:
        """The number of inputs that were passed to the model so far, in all datasets."""
        return self._engine.num_encoded + sum(other.num_encoded for other in self._of_datasets.values())

    @property
    def num_halvings(self) -> int:
        """The number of times that a batch was halved because memory ran out."""
        return self._engine.num_halvings + sum(other.num_halvings for other in self._of_datasets.values())

    def add(self, side: Side, items: Iterable[Item], label: str = "") -> None:
        """Encode the items that are not known yet on this side.

        Args:
            side: `query` or `document`.
            items: The items; repeated items cost nothing.
            label: The name of this piece of work in the progress bar.

        Raises:
            TypeError: The encoder returns something other than (n, d) unit rows.
            ValueError: The encoder refuses every input of a batch; the error is the encoder's own.
        """
        given = dict.fromkeys(items)
        unknown = {path for item in given for path in item.images} - self._facts.keys()
        self._facts.update(self._reader.read(unknown, label or side))
        works: dict[tuple[str, tuple[str, ...]], Work] = {}
        for item in given:
            digests = self._digests(item)
            if not isinstance(digests, Fault) and (side, item.text, digests) not in self._places:
                works.setdefault((item.text, digests), Work(item.text, digests, item.images))
        missing: list[PlannedShard] = []
        for batches in _chunks(self._cut(side, list(works.values())), BATCHES_PER_SHARD):
            planned = PlannedShard(len(self._shards), _key(side, batches, self._prompts.get(side, "")), batches)
            found = self._store.get(planned.key, planned.num_rows)
            if found is None:
                missing.append(planned)
            else:
                self._num_reused += found.num_rows
            # A missing shard gets a placeholder, so that numbers do not depend on which shards were found.
            self._shards.append(found or StoredShard(Path(), 0, 0, {}))
            rows = (work for batch in batches for work in batch.works)
            for row, work in enumerate(rows):
                self._places[side, work.text, work.digests] = (planned.number, row)
        if missing:
            self._engine.make(side, missing, label or side, self._place_shard)

    def fault(self, side: Side, item: Item) -> Fault | None:
        """Return the reason why an item has no vector.

        Args:
            side: The side on which the item was added.
            item: An item that was added.

        Returns:
            The reason; None if the item has a vector.

        Raises:
            KeyError: The item was never added on this side.
        """
        place = self._place(side, item)
        if isinstance(place, Fault):
            return place
        fault = self._shards[place[0]].errors.get(place[1])
        return Fault(*fault) if fault else None

    def content(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """Return the content of an item, which is equal for equal texts and images, whatever the names of the images.

        Args:
            item: An item that was added, on either side.

        Raises:
            KeyError: The item was never added.
            ValueError: One of its images cannot be used.
        """
        digests = self._digests(item)
        if isinstance(digests, Fault):
            raise Gen2EmbedError(f"{item!r} cannot be compared: {digests.reason}")
        return item.text, digests

    def vectors(self, side: Side, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Return the vectors of items.

        Args:
            side: The side on which the items were added.
            items: n items that were added and have no fault.

        Returns:
            (n, d) float32, in the order of `items`.

        Raises:
            KeyError: An item was never added on this side.
            ValueError: An item has a fault.
            StoreMismatchError: The store's shards have vectors of unequal widths.
            OSError: A shard can no longer be read.
        """
        if not items:
            return np.zeros((0, 0), np.float32)
        places = np.empty((len(items), 2), np.int64)
        for number, item in enumerate(items):
            place = self._place(side, item)
            fault = place if isinstance(place, Fault) else self._shards[place[0]].errors.get(place[1])
            if fault:
                raise Gen2EmbedError(f"{item!r} has no vector: {fault[1]}")
            places[number] = place
        numbers = np.unique(places[:, 0]).tolist()
        widths = {self._shards[number].width: self._shards[number].path for number in numbers}
        if len(widths) > 1:
            listed = ", ".join(f"{width} in {path.name}" for width, path in sorted(widths.items()))
            raise StoreMismatchError(
                f"{self._store.directory}: its vectors have unequal widths ({listed}); pass another folder"
            )
        out = np.empty((len(items), *widths), np.float32)
        # Only one shard's file is open at a time: there may be more shards than a process may open files.
        for number in numbers:
            wanted = np.flatnonzero(places[:, 0] == number)
            out[wanted] = self._shards[number].vectors[places[wanted, 1]]
        return out

    def _place(self, side: Side, item: Item) -> tuple[int, int] | Fault:
        digests = self._digests(item)
        return digests if isinstance(digests, Fault) else self._places[side, item.text, digests]

    def _digests(self, item: Item) -> tuple[str, ...] | Fault:
        return digests_of(item, self._facts)

    def _cut(self, side: Side, works: list[Work]) -> list[Batch]:
        """Return batches of inputs of similar length, longest first."""
        sizes = [[self._final_size(path) for path in work.paths] for work in works]
        lengths = dict(zip(works, self._encoder.count_tokens(side, [w.text for w in works], sizes), strict=True))
        works = sorted(works, key=lambda work: (-lengths[work], work.text, work.digests))
        counts = [lengths[work] for work in works]
        pixels = [sum(map(self._num_pixels, work.paths)) for work in works]
        return [
            Batch(tuple(works[start:stop]), sum(counts[start:stop]), sum(pixels[start:stop]))
            for start, stop in cut_batches(counts, self._batch_tokens, self._batch_size, pixels)
        ]

    def _final_size(self, path: str) -> Size:
        return fitted_size(self._known_facts(path).size, self._image_options, path)

    def _num_pixels(self, path: str) -> int:
        """Return the number of pixels of an image in memory: as in its file or as resized, whichever is more."""
        return max(math.prod(self._known_facts(path).size), math.prod(self._final_size(path)))

    def _known_facts(self, path: str) -> ImageFacts:
        facts = self._facts[path]
        if isinstance(facts, Fault):
            raise KeyError(path)
        return facts

    def _open_engine(self) -> Engine:
        """Return what computes missing shards: the encoder's own engine if it brings one, otherwise this process."""
        if isinstance(self._given, EngineEncoder):
            return self._given.engine(self._store, self._opener, self._num_workers)
        pipeline = Pipeline(self._encoder, self._opener)
        return LocalEngine(pipeline, self._helpers, self._store, self._share, self._peers)

    def _place_shard(self, planned: PlannedShard, shard: StoredShard) -> None:
        self._shards[planned.number] = shard


def digests_of(item: Item, facts: Mapping[str, ImageFacts | Fault]) -> tuple[str, ...] | Fault:
    """Return the digests of an item's images, or what is wrong with the first that cannot be used.

    Args:
        item: The item.
        facts: What is known of its images, by path.
    """
    found = [facts[path] for path in item.images]
    faults = [fact for fact in found if isinstance(fact, Fault)]
    return faults[0] if faults else tuple(fact.digest for fact in found if isinstance(fact, ImageFacts))


def cut_batches(
    lengths: Sequence[int], batch_tokens: int, batch_size: int, pixels: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Cut inputs that are sorted by length, longest first, into batches of similar lengths.

    Args:
        lengths: n lengths in tokens, descending.
        batch_tokens: The most tokens per batch, padding included; an input that is longer forms a batch alone.
        batch_size: The most inputs per batch.
        pixels: n numbers of decoded pixels. A batch has at most `MAX_PIXELS_IN_FLIGHT` of them; an input with more
            forms a batch alone.

    Returns:
        The start (included) and the end (excluded) of each batch, in order.
    """
    batches: list[tuple[int, int]] = []
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        most = min(batch_size, max(1, batch_tokens // longest), len(lengths) - start)
        tokens = rows = num_pixels = 0
        while rows < most:
            num_pixels += pixels[start + rows] if pixels is not None else 0
            if rows and num_pixels > MAX_PIXELS_IN_FLIGHT:
                break
            grown = tokens + lengths[start + rows]
            padding = (rows + 1) * longest - grown
            if padding > max(NEGLIGIBLE_PADDING, MAX_PADDING * (rows + 1) * longest):
                break
            tokens, rows = grown, rows + 1
        batches.append((start, start + rows))
        start += rows
    return batches


def _key(side: Side, batches: list[Batch], prompt: str) -> str:
    """Return the digest of one shard's work; if an image is repaired, its digest changes, and so does the key.

    Args:
        side: Its side.
        batches: Its inputs.
        prompt: The prompt of the dataset; empty for the encoder's usual prompt, which the store's identity contains.
    """
    work = [[[work.text, work.digests] for work in batch.works] for batch in batches]
    described = [side, work, prompt] if prompt else [side, work]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _chunks(batches: list[Batch], size: int) -> list[list[Batch]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]
