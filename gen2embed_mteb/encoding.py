"""Making many vectors: every distinct input once, in sorted batches, prepared ahead, every shard kept on disk.

1. Inputs already known, from this call or an earlier one, are dropped: a candidate shared by a thousand rows or by
   two datasets is encoded once per side. Images are compared by the bytes of their files, not by name.
2. The rest is sorted by length in tokens, prompt and images included, longest first, so that memory that does not
   suffice shows at once. It is cut into batches of like lengths and at most `batch_tokens`, the batches into shards.
   The cut is a pure function of the inputs: an interrupted run that is started again forms the same batches, hence
   the same vectors to the bit.
3. Shards found in the store are reused. Of the others every process makes its share, batch by batch, while threads
   open and prepare the next ones; then it waits for the shares of the others (`sharing.py`).

An input whose image cannot be opened, or that the encoder refuses on its own, is recorded with its reason.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.image_source import ImageSource, open_input
from gen2embed_mteb.images import ImageError, ImageFacts, Size, min_side_size, resized_size
from gen2embed_mteb.sharing import Share
from gen2embed_mteb.store import EmbeddingStore, Shard

logger = logging.getLogger(__name__)

Side = Literal["query", "document"]
BATCHES_PER_SHARD = 16
MAX_PADDING, NEGLIGIBLE_PADDING = 0.1, 128
"""A batch ends where more than this share of it, and more than this number of tokens, would be padding."""
LOOKAHEAD = 2  # batches that are opened and prepared while another one is encoded


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


@runtime_checkable
class StagedEncoder(Protocol):
    """An encoder whose work comes in stages, so that the next batch is prepared while the model runs this one."""

    @property
    def batch_tokens(self) -> int:
        """How many tokens a call should have, padding included, where the model is."""

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        """The lengths of n inputs in tokens, from their texts and the (width, height) of their images."""

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Any:
        """Everything before the model, on the CPU; called from one thread."""

    def encode_prepared(self, side: Side, batch: Any) -> Any:
        """(n, d) float32 unit rows of what `prepare` returned."""


class _Unstaged:
    """A plain `Encoder` as a `StagedEncoder`; lengths are guessed."""

    batch_tokens = 8192

    def __init__(self, encoder: Encoder) -> None:
        self._encode = {"query": encoder.encode_query, "document": encoder.encode_document}

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        return [1 + len(text) // 4 + 256 * len(sizes) for text, sizes in zip(texts, image_sizes, strict=True)]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def encode_prepared(self, side: Side, batch: list[dict[str, Any]]) -> Any:
        return self._encode[side](batch)


class _Work(NamedTuple):
    """A distinct input: its text and the digests of its images; the paths are one way to reach them."""

    text: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class _Batch:
    works: tuple[_Work, ...]
    num_tokens: int
    """Of all its rows together, padding not counted."""


@dataclass(frozen=True)
class _Failed:
    fault: Fault


_Row = npt.NDArray[np.float32] | _Failed


@dataclass(frozen=True)
class _PlannedShard:
    number: int
    key: str
    batches: list[_Batch]


class BulkEncoder:
    """Encodes items on both sides and remembers where their vectors are.

    Args:
        encoder: The model; a `StagedEncoder` such as `PrefixEncoder` is sorted by its own count of tokens and
            prepared ahead.
        store: Where shards are kept.
        images: Where images lie.
        batch_tokens: Tokens a call of the model, padding included; an input that is longer runs alone. None: what the
            encoder asks for.
        batch_size: Inputs a call of the model, at most.
        resize_policy: A name of `images.RESIZE_POLICIES`.
        min_side: The least side of an image in pixels; see `images.ensure_min_side`.
        num_workers: Threads that open images.
        share: Which part of the work is this process's; by default all of it.

    Attributes:
        num_encoded: Inputs handed to the model by this object so far.
        num_reused: Inputs whose vectors came from the store.
        num_halvings: How often a batch was halved because memory ran out.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: EmbeddingStore,
        images: ImageSource,
        *,
        batch_tokens: int | None = None,
        batch_size: int = 512,
        resize_policy: str = "processor",
        min_side: int = 28,
        num_workers: int = 4,
        share: Share | None = None,
    ) -> None:
        """Keeps the parts; nothing is read yet."""
        self._encoder: StagedEncoder = encoder if isinstance(encoder, StagedEncoder) else _Unstaged(encoder)
        self._store = store
        self._images = images
        self._batch_tokens = batch_tokens or self._encoder.batch_tokens
        self._batch_size = batch_size
        self._resize_policy = resize_policy
        self._min_side = min_side
        self._num_workers = num_workers
        self._share = share or Share()
        self._token_limit = sys.maxsize
        self._shards: list[Shard] = []
        self._places: dict[tuple[Side, str, tuple[str, ...]], tuple[int, int]] = {}
        self._facts: dict[str, ImageFacts | Fault] = {}
        self.num_encoded = 0
        self.num_reused = 0
        self.num_halvings = 0

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
        given = dict.fromkeys(items)
        self._read_facts({path for item in given for path in item.images}, label or side)
        works: dict[tuple[str, tuple[str, ...]], _Work] = {}
        for item in given:
            digests = self._digests(item)
            if not isinstance(digests, Fault) and (side, item.text, digests) not in self._places:
                works.setdefault((item.text, digests), _Work(item.text, digests, item.images))
        missing: list[_PlannedShard] = []
        for batches in _chunks(self._cut(side, list(works.values())), BATCHES_PER_SHARD):
            planned = _PlannedShard(len(self._shards), _key(side, batches), batches)
            found = self._store.get(planned.key)
            if found is None:
                missing.append(planned)
            else:
                self.num_reused += len(found.vectors)
            # A shard still to be made holds its place, so that numbers do not depend on what was found.
            self._shards.append(found or Shard(np.zeros((0, 0), np.float32), {}))
            rows = (work for batch in batches for work in batch.works)
            for row, work in enumerate(rows):
                self._places[side, work.text, work.digests] = (planned.number, row)
        if missing:
            self._make(side, missing, label or side)

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
        place = self._place(side, item)
        if isinstance(place, Fault):
            return place
        fault = self._shards[place[0]].errors.get(place[1])
        return Fault(*fault) if fault else None

    def content(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """What an item is: equal for items of equal text and images, whatever the images are called.

        Args:
            item: An item that was added, on either side.

        Raises:
            KeyError: The item was never added.
            ValueError: One of its images cannot be used.
        """
        digests = self._digests(item)
        if isinstance(digests, Fault):
            raise ValueError(f"{item!r} cannot be compared: {digests.reason}")
        return item.text, digests

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
        if not items:
            return np.zeros((0, 0), np.float32)
        places = np.empty((len(items), 2), np.int64)
        for number, item in enumerate(items):
            place = self._place(side, item)
            fault = place if isinstance(place, Fault) else self._shards[place[0]].errors.get(place[1])
            if fault:
                raise ValueError(f"{item!r} has no vector: {fault[1]}")
            places[number] = place
        out = np.empty((len(items), self._shards[places[0, 0]].vectors.shape[1]), np.float32)
        for number in np.unique(places[:, 0]).tolist():
            wanted = np.flatnonzero(places[:, 0] == number)
            out[wanted] = self._shards[number].vectors[places[wanted, 1]]
        return out

    def _place(self, side: Side, item: Item) -> tuple[int, int] | Fault:
        digests = self._digests(item)
        return digests if isinstance(digests, Fault) else self._places[side, item.text, digests]

    def _digests(self, item: Item) -> tuple[str, ...] | Fault:
        facts = [self._facts[path] for path in item.images]
        faults = [fact for fact in facts if isinstance(fact, Fault)]
        return faults[0] if faults else tuple(fact.digest for fact in facts if isinstance(fact, ImageFacts))

    def _read_facts(self, paths: Iterable[str], label: str) -> None:
        """Reads each new image file once for its digest and size."""
        new = sorted(path for path in paths if path not in self._facts)
        if not new:
            return
        with ThreadPoolExecutor(self._num_workers, thread_name_prefix="facts") as pool:
            found = _progress(pool.map(self._facts_of, new), len(new), f"{label}: reading images", "image")
            self._facts.update(zip(new, found, strict=True))

    def _facts_of(self, path: str) -> ImageFacts | Fault:
        try:
            return self._images.facts(path)
        except ImageError as error:
            return Fault(error.file, error.reason)

    def _cut(self, side: Side, works: list[_Work]) -> list[_Batch]:
        """Batches of inputs of like length, longest first."""
        sizes = [[self._final_size(path) for path in work.paths] for work in works]
        lengths = dict(zip(works, self._encoder.count_tokens(side, [w.text for w in works], sizes), strict=True))
        works = sorted(works, key=lambda work: (-lengths[work], work.text, work.digests))
        counts = [lengths[work] for work in works]
        return [
            _Batch(tuple(works[start:stop]), sum(counts[start:stop]))
            for start, stop in cut_batches(counts, self._batch_tokens, self._batch_size)
        ]

    def _final_size(self, path: str) -> Size:
        facts = self._facts[path]
        if isinstance(facts, Fault):
            raise KeyError(path)
        return min_side_size(resized_size(facts.size, self._resize_policy), self._min_side)

    def _make(self, side: Side, missing: list[_PlannedShard], label: str) -> None:
        """Makes this process's share of the missing shards, and waits for the rest."""
        started = time.monotonic()
        total = sum(batch.num_tokens for shard in missing for batch in shard.batches)
        rows = 0
        with _token_bar(total, label, silent=self._share.rank > 0) as bar, _Stages(self, side) as stages:

            def place(planned: _PlannedShard, shard: Shard) -> None:
                nonlocal rows
                self._shards[planned.number] = shard
                rows += len(shard.vectors)
                bar.set_postfix_str(f"{rows / (time.monotonic() - started):.1f} items/s", refresh=False)

            own = [planned for planned in missing if self._share.owns(planned.number)]
            for planned, shard in zip(own, stages.run(own, bar), strict=True):
                place(planned, self._store.put(planned.key, shard))
            others = {planned.key: planned for planned in missing if not self._share.owns(planned.number)}
            for key, found in self._share.await_others(list(others), self._store):
                planned = others[key]
                if found is not None:
                    bar.update(sum(batch.num_tokens for batch in planned.batches))
                    place(planned, found)
                    continue
                for shard in stages.run([planned], bar):
                    place(planned, self._store.put(key, shard))

    def _load(self, work: _Work) -> dict[str, Any] | _Failed:
        try:
            return open_input(self._images, work.text, work.paths, self._resize_policy, self._min_side)
        except ImageError as error:
            return _Failed(Fault(error.file, error.reason))


class _Stages:
    """The pipeline of one call: threads open images, one thread prepares batches, the caller's runs the model."""

    def __init__(self, bulk: BulkEncoder, side: Side) -> None:
        self._bulk, self._side, self._encoder = bulk, side, bulk._encoder
        self._openers = ThreadPoolExecutor(bulk._num_workers, thread_name_prefix="image")
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._openers, self._preparer):
            pool.shutdown(cancel_futures=True)

    def run(self, shards: Sequence[_PlannedShard], bar: Any) -> Iterator[Shard]:
        """Makes shards in order."""
        ready = self._ahead([batch for shard in shards for batch in shard.batches])
        for shard in shards:
            rows: list[_Row] = []
            halvings = self._bulk.num_halvings
            for batch in shard.batches:
                entries, prepared = next(ready)
                inputs = [entry for entry in entries if isinstance(entry, dict)]
                tokens = batch.num_tokens * len(inputs) // len(entries)
                made = iter(self._encode(inputs, prepared, tokens))
                rows.extend(next(made) if isinstance(entry, dict) else entry for entry in entries)
                bar.update(batch.num_tokens)
            yield _as_shard(rows, self._bulk.num_halvings - halvings)

    def _ahead(self, batches: list[_Batch]) -> Iterator[tuple[list[dict[str, Any] | _Failed], Any]]:
        pending: deque[Future[tuple[list[dict[str, Any] | _Failed], Any]]] = deque()
        for batch in batches:
            opened = [self._openers.submit(self._bulk._load, work) for work in batch.works]
            pending.append(self._preparer.submit(self._gather, opened))
            if len(pending) > LOOKAHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _gather(self, opened: list[Future[dict[str, Any] | _Failed]]) -> tuple[list[dict[str, Any] | _Failed], Any]:
        entries = [future.result() for future in opened]
        return entries, self._prepare([entry for entry in entries if isinstance(entry, dict)])

    def _prepare(self, inputs: list[dict[str, Any]]) -> Any:
        """The prepared batch; `None` of nothing; the error of an input that the encoder refuses."""
        try:
            return self._encoder.prepare(self._side, inputs) if inputs else None
        except ValueError as error:
            return error

    def _encode(self, inputs: list[dict[str, Any]], prepared: Any, tokens: int) -> list[_Row]:
        """Runs one batch; halves it when memory runs out, and takes it apart when the encoder refuses it."""
        if not inputs:
            return []
        bulk = self._bulk
        refusal: ValueError | None = None
        if len(inputs) == 1 or tokens <= bulk._token_limit:
            try:
                if isinstance(prepared, ValueError):
                    raise prepared
                vectors = np.asarray(self._encoder.encode_prepared(self._side, prepared), dtype=np.float32)
                bulk.num_encoded += len(inputs)
                return _checked(vectors, len(inputs))
            except ValueError as error:
                if len(inputs) == 1:
                    return [_Failed(Fault("", f"refused by the encoder: {error}"))]
                refusal = error
            except (RuntimeError, MemoryError) as error:
                # torch.OutOfMemoryError by name: torch is not imported for this.
                if type(error).__name__ not in ("OutOfMemoryError", "MemoryError") or len(inputs) == 1:
                    raise
                bulk._token_limit = tokens // 2
                logger.warning(
                    "out of memory at %d inputs of %d tokens: halving such batches from now on; pass --batch_tokens %d",
                    len(inputs),
                    tokens,
                    bulk._token_limit,
                )
        # Out here the error is gone, and with it the frames that held the failed batch in memory.
        del prepared
        if refusal is not None:
            parts = [self._again([entry], 1) for entry in inputs]
            if all(isinstance(part[0], _Failed) for part in parts):
                raise refusal  # not one odd input: the encoder itself is at fault
            return [part[0] for part in parts]
        bulk.num_halvings += 1
        half = len(inputs) // 2
        first = tokens * half // len(inputs)
        return self._again(inputs[:half], first) + self._again(inputs[half:], tokens - first)

    def _again(self, inputs: list[dict[str, Any]], tokens: int) -> list[_Row]:
        # In the preparer's thread, as always: tokenizers are not made for two at a time.
        return self._encode(inputs, self._preparer.submit(self._prepare, inputs).result(), tokens)


def cut_batches(lengths: Sequence[int], batch_tokens: int, batch_size: int) -> list[tuple[int, int]]:
    """Cuts inputs that are sorted by length, longest first, into batches of like lengths.

    Args:
        lengths: n lengths in tokens, descending.
        batch_tokens: Tokens a batch, padding included; an input that is longer makes a batch alone.
        batch_size: Inputs a batch, at most.

    Returns:
        The first and the last place, the latter excluded, of each batch, in order.
    """
    batches: list[tuple[int, int]] = []
    start = 0
    while start < len(lengths):
        longest = lengths[start]
        most = min(batch_size, max(1, batch_tokens // longest), len(lengths) - start)
        tokens = rows = 0
        while rows < most:
            grown = tokens + lengths[start + rows]
            padding = (rows + 1) * longest - grown
            if padding > max(NEGLIGIBLE_PADDING, MAX_PADDING * (rows + 1) * longest):
                break
            tokens, rows = grown, rows + 1
        batches.append((start, start + rows))
        start += rows
    return batches


def _key(side: Side, batches: list[_Batch]) -> str:
    """Digests one shard's work; a repaired image changes its digest, hence the key."""
    work = [[[work.text, work.digests] for work in batch.works] for batch in batches]
    return hashlib.sha256(json.dumps([side, work]).encode()).hexdigest()


def _checked(vectors: npt.NDArray[np.float32], count: int) -> list[_Row]:
    """Splits the encoder's answer into rows and holds it to its contract."""
    if vectors.ndim != 2 or len(vectors) != count:
        raise TypeError(f"the encoder returned shape {vectors.shape} for {count} inputs; expected ({count}, d)")
    rows: list[_Row] = []
    for vector, norm in zip(vectors, np.linalg.norm(vectors, axis=1).tolist(), strict=True):
        if not np.isfinite(norm):
            rows.append(_Failed(Fault("", "the encoder returned NaN or infinity")))
        elif abs(norm - 1.0) > 1e-2:
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


def _chunks(batches: list[_Batch], size: int) -> list[list[_Batch]]:
    return [batches[start : start + size] for start in range(0, len(batches), size)]


@contextmanager
def _token_bar(total: int, label: str, *, silent: bool) -> Iterator[Any]:
    """A bar over tokens: the time left follows from them, as a long input takes as long as many short ones."""
    from tqdm import tqdm

    off = silent or not sys.stderr.isatty()
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, disable=off) as bar:
        yield bar


def _progress(items: Iterator[Any], total: int, label: str, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit=unit, desc=label, disable=not sys.stderr.isatty(), leave=False))
