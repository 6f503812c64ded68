"""Making many vectors: every distinct input once, in sorted batches, images read ahead, every shard kept on disk.

1. Inputs already known, from this call or an earlier one, are dropped: a candidate shared by a thousand rows or by
   two datasets is encoded once per side.
2. The rest is sorted by (has image, length of text), so that a batch pads little, and cut into batches and the batches
   into shards. The cut is a pure function of the inputs: an interrupted run that is started again forms the same
   batches, hence the same vectors to the bit.
3. Shards found in the store are reused; the others are encoded batch by batch while threads open the next images.

An input whose image cannot be opened, or that the encoder refuses on its own, is recorded with its reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.image_source import ImageSource
from gen2embed_mteb.images import ImageError, ensure_min_side, resize
from gen2embed_mteb.store import EmbeddingStore, Shard

logger = logging.getLogger(__name__)

Side = Literal["query", "document"]
_T = TypeVar("_T")
BATCHES_PER_SHARD = 16
LOOKAHEAD = 2  # batches whose images are opened while another one is encoded


class Item(NamedTuple):
    """What is encoded: a text and the paths of its images; hashable, equal when both are equal."""

    text: str
    images: tuple[str, ...] = ()


class Fault(NamedTuple):
    """Why an item has no vector: the file at fault (empty if it is the item itself) and the reason."""

    file: str
    reason: str


class Encoder(Protocol):
    """What bulk encoding needs of a model; `Gen2Embed` is one.

    Both methods take a list of `{"text": str, "image": PIL image or list of them}`, either key missing, and return
    an array-like of shape (n, d), one unit row an input.
    """

    def encode_query(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encodes queries: (n, d) float32 unit rows."""

    def encode_document(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encodes candidates: (n, d) float32 unit rows."""


class _Failed(NamedTuple):
    fault: Fault


class BulkEncoder:
    """Encodes items on both sides and remembers where their vectors are.

    Args:
        encoder: The model.
        store: Where shards are kept.
        images: Where images lie.
        batch_size: Inputs a call of the model.
        resize_policy: A name of `images.RESIZE_POLICIES`.
        min_side: The least side of an image in pixels; see `images.ensure_min_side`.
        num_workers: Threads that open images.

    Attributes:
        num_encoded: Inputs handed to the model by this object so far.
        num_reused: Inputs whose vectors came from the store.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: EmbeddingStore,
        images: ImageSource,
        *,
        batch_size: int = 16,
        resize_policy: str = "processor",
        min_side: int = 28,
        num_workers: int = 4,
    ) -> None:
        """Keeps the parts; nothing is read yet."""
        self._encode = {"query": encoder.encode_query, "document": encoder.encode_document}
        self._store = store
        self._images = images
        self._batch_size = batch_size
        self._resize_policy = resize_policy
        self._min_side = min_side
        self._num_workers = num_workers
        self._shards: list[Shard] = []
        self._places: dict[tuple[Side, Item], tuple[int, int]] = {}
        self.num_encoded = 0
        self.num_reused = 0

    def add(self, side: Side, items: Iterable[Item], label: str = "") -> None:
        """Encodes the items that are not known yet on this side.

        Args:
            side: `query` or `document`.
            items: The items; repetitions are free.
            label: What to call this piece of work in the progress bar.

        Raises:
            TypeError: The encoder returns something else than (n, d) unit rows.
            ValueError: The encoder refuses every input of a batch; its own error.
        """
        known = self._places
        new = [item for item in dict.fromkeys(items) if (side, item) not in known]
        new.sort(key=lambda item: (bool(item.images), len(item.text), item.text, item.images))
        shards = _chunks(_chunks(new, self._batch_size), BATCHES_PER_SHARD)
        missing: list[tuple[int, str, list[list[Item]]]] = []
        for batches in shards:
            key = self._key(side, batches)
            found = self._store.get(key)
            number = len(self._shards)
            if found is None:
                missing.append((number, key, batches))
            else:
                self.num_reused += len(found.vectors)
            # A shard still to be made holds its place, so that numbers do not depend on what was found.
            self._shards.append(found or Shard(np.zeros((0, 0), np.float32), {}))
            items_of_shard = [item for batch in batches for item in batch]
            known.update(((side, item), (number, row)) for row, item in enumerate(items_of_shard))
        if missing:
            self._make(side, missing, label)

    def fault(self, side: Side, item: Item) -> Fault | None:
        """Tells why an item has no vector.

        Args:
            side: The side it was added on.
            item: An item that was added.

        Returns:
            None if it has a vector.

        Raises:
            KeyError: The item was never added on this side.
        """
        number, row = self._places[side, item]
        fault = self._shards[number].errors.get(row)
        return Fault(*fault) if fault else None

    def vectors(self, side: Side, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Gathers vectors.

        Args:
            side: The side they were added on.
            items: n items that were added and have no fault.

        Returns:
            (n, d) float32, in the order of `items`.

        Raises:
            KeyError: An item was never added on this side.
            ValueError: An item has a fault.
        """
        places = [self._places[side, item] for item in items]
        for item, (number, row) in zip(items, places, strict=True):
            if row in self._shards[number].errors:
                raise ValueError(f"{item!r} has no vector: {self._shards[number].errors[row][1]}")
        if not places:
            return np.zeros((0, 0), np.float32)
        return np.stack([self._shards[number].vectors[row] for number, row in places])

    def _key(self, side: Side, batches: list[list[Item]]) -> str:
        """Digests one shard's work; a repaired image changes its stamp, hence the key."""
        stamp = self._images.stamp
        work = [[[item.text, [[path, stamp(path)] for path in item.images]] for item in batch] for batch in batches]
        return hashlib.sha256(json.dumps([side, work]).encode()).hexdigest()

    def _make(self, side: Side, missing: list[tuple[int, str, list[list[Item]]]], label: str) -> None:
        from tqdm import tqdm

        total = sum(len(batch) for _, _, batches in missing for batch in batches)
        loaded = self._load_ahead([batch for _, _, batches in missing for batch in batches])
        with tqdm(total=total, unit="row", desc=label or side, disable=not sys.stderr.isatty()) as bar:
            for number, key, batches in missing:
                rows: list[npt.NDArray[np.float32] | _Failed] = []
                for _ in batches:
                    batch = next(loaded)
                    rows.extend(self._encode_batch(side, batch))
                    bar.update(len(batch))
                shard = _as_shard(rows)
                self._store.put(key, shard)
                self._shards[number] = shard

    def _load_ahead(self, batches: list[list[Item]]) -> Iterator[list[dict[str, Any] | _Failed]]:
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="image") as pool:
            pending: deque[list[Future[dict[str, Any] | _Failed]]] = deque()
            for batch in batches:
                pending.append([pool.submit(self._load, item) for item in batch])
                if len(pending) > LOOKAHEAD:
                    yield [future.result() for future in pending.popleft()]
            while pending:
                yield [future.result() for future in pending.popleft()]

    def _load(self, item: Item) -> dict[str, Any] | _Failed:
        try:
            images = [
                ensure_min_side(resize(self._images.open(path), self._resize_policy), self._min_side)
                for path in item.images
            ]
        except ImageError as error:
            return _Failed(Fault(error.file, error.reason))
        entry: dict[str, Any] = {}
        if item.text or not images:  # an empty text alone is still an input: the prompt surrounds it
            entry["text"] = item.text
        if images:
            entry["image"] = images[0] if len(images) == 1 else images
        return entry

    def _encode_batch(
        self, side: Side, batch: list[dict[str, Any] | _Failed]
    ) -> list[npt.NDArray[np.float32] | _Failed]:
        inputs = [entry for entry in batch if isinstance(entry, dict)]
        made = iter(self._encode_inputs(side, inputs))
        return [next(made) if isinstance(entry, dict) else entry for entry in batch]

    def _encode_inputs(self, side: Side, inputs: list[dict[str, Any]]) -> list[npt.NDArray[np.float32] | _Failed]:
        """Encodes one batch; halves it when memory runs out, and takes it apart when the encoder refuses it."""
        if not inputs:
            return []
        try:
            vectors = np.asarray(self._encode[side](inputs), dtype=np.float32)
        except ValueError as error:
            if len(inputs) == 1:
                return [_Failed(Fault("", f"refused by the encoder: {error}"))]
            parts = [self._encode_inputs(side, [entry]) for entry in inputs]
            if all(isinstance(part[0], _Failed) for part in parts):
                raise  # not one odd input: the encoder itself is at fault
            return [part[0] for part in parts]
        except (RuntimeError, MemoryError) as error:
            # torch.OutOfMemoryError by name: torch is not imported for this.
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") or len(inputs) == 1:
                raise
            logger.warning("out of memory at batch size %d: halving it; pass a smaller --batch_size", len(inputs))
            half = len(inputs) // 2
            return self._encode_inputs(side, inputs[:half]) + self._encode_inputs(side, inputs[half:])
        self.num_encoded += len(inputs)
        return _checked(vectors, len(inputs))


def _checked(vectors: npt.NDArray[np.float32], count: int) -> list[npt.NDArray[np.float32] | _Failed]:
    """Splits the encoder's answer into rows and holds it to its contract."""
    if vectors.ndim != 2 or len(vectors) != count:
        raise TypeError(f"the encoder returned shape {vectors.shape} for {count} inputs; expected ({count}, d)")
    rows: list[npt.NDArray[np.float32] | _Failed] = []
    for vector in vectors:
        norm = float(np.linalg.norm(vector))
        if not np.isfinite(norm):
            rows.append(_Failed(Fault("", "the encoder returned NaN or infinity")))
        elif abs(norm - 1.0) > 1e-2:
            raise TypeError(f"the encoder returned a row of norm {norm:.4f}; normalise its vectors (L2)")
        else:
            rows.append(vector)
    return rows


def _as_shard(rows: list[npt.NDArray[np.float32] | _Failed]) -> Shard:
    width = next((len(row) for row in rows if not isinstance(row, _Failed)), 0)
    vectors = np.zeros((len(rows), width), np.float32)
    errors: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        if isinstance(row, _Failed):
            errors[number] = (row.fault.file, row.fault.reason)
        else:
            vectors[number] = row
    return Shard(vectors, errors)


def _chunks(items: list[_T], size: int) -> list[list[_T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
