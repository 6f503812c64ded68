"""Turns sampling files into what a trainer reads: a `datasets.Dataset` of pairs, and the clusters in rows of it.

    method of the file       columns                                       a row is      a cluster is
    saha                     query, positive                               a pair        an anchor and its k members
    in-batch                 query, positive                               a pair        the pair alone
    hn, hn-beta              query, positive, negative_1, …, negative_k    a query       the row alone

Plain hard negatives are extra candidates of one query, not pairs, hence columns. A column's name must not be the
beginning of another's (sentence-transformers collects features by prefix), so none is called plain `negative`.

A cell is `{"text": str, "image": [path, …]}`: no image is opened before a row is used. `SahaTrainer` opens the cells of
a batch when the batch is made. For other trainers `OpenInputs` opens them, and leaves out the keys that a row does not
have, as the stock collator needs it.

Only rows that occur in a cluster become rows of the dataset: those that sampling set aside cannot be read. Building the
dataset takes one pass over the rows of each subset, and keeps the texts and paths of the rows in use in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.images.resizing import MIN_SIDE, ImageOptions
from gen2embed_mteb.images.source import ImageSource, open_input
from gen2embed_mteb.mmeb.readers import BadRow
from trainers.data.cells import read_cell
from trainers.data.training_data import TrainingData, TrainingSubset
from trainers.sampling.files import RowsDigest, Sampling, SamplingError

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = ("saha", "in-batch")
"""The methods whose clusters are made of pairs; the others have their negatives as extra candidates."""


@dataclass(frozen=True, eq=False, repr=False)
class DatasetClusters:
    """Clusters in rows of a dataset, which is the concatenation of one or several subsets.

    Attributes:
        names: The names of the subsets.
        rows: (C, k + 1) int64 rows of the dataset, the anchor first, -1 where a cluster is short.
        subsets: (C,) int64, the index of each cluster's subset in `names`.
        num_rows: The number of rows of the dataset.
        positives: (num_rows,) int64, equal where positives are equal; None if it is not known which are equal.
    """

    names: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    subsets: npt.NDArray[np.int64]
    num_rows: int
    positives: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, sampling: Sampling | Sequence[Sampling]) -> DatasetClusters:
        """Return the clusters for a dataset that holds exactly the rows that were sampled, subset after subset.

        Args:
            sampling: What `read_sampling` returned, once or several times.

        Raises:
            SamplingError: The files' negatives are not pairs, or the files differ in method or k.
        """
        samplings = _alike(sampling)
        if samplings[0].record["method"] not in PAIRS:
            raise SamplingError(
                f"{samplings[0].path}: negatives of method {samplings[0].record['method']} are not pairs but further "
                "columns; build the dataset with trainers.training_dataset"
            )
        offsets = np.cumsum([0, *(one.record["data"]["num_rows"] for one in samplings)])
        rows = [_row_ids(one) for one in samplings]
        return cls(
            tuple(one.record["subset"] for one in samplings),
            np.concatenate([np.where(ids < 0, -1, ids + start) for ids, start in zip(rows, offsets, strict=False)]),
            np.repeat(np.arange(len(rows)), [len(ids) for ids in rows]),
            int(offsets[-1]),
        )

    @property
    def width(self) -> int:
        """The number of rows of a whole cluster, k + 1."""
        return int(self.rows.shape[1])

    def __len__(self) -> int:
        """Return the number of clusters."""
        return len(self.rows)

    def __repr__(self) -> str:
        # Shown in logs and model cards.
        subsets = self.names[0] if len(self.names) == 1 else f"{len(self.names)} subsets"
        return f"DatasetClusters({subsets}, {len(self)} clusters of {self.width}, {self.num_rows} rows)"


@dataclass(frozen=True)
class TrainingSet:
    """What a trainer needs of training data and its sampling files.

    Attributes:
        dataset: The rows; this module's docstring describes its columns and cells.
        clusters: The clusters in rows of `dataset`.
        num_drawn: How many negatives were drawn because a query had fewer than k of its own (`hn`, `hn-beta`).
    """

    dataset: Dataset
    clusters: DatasetClusters
    num_drawn: int

    @property
    def roles(self) -> dict[str, str]:
        """The role of each column, as `router_mapping` of the training arguments takes it."""
        return {name: "query" if name == "query" else "document" for name in self.dataset.column_names}


class OpenInputs:
    """Opens the images of stored cells: pass it to `Dataset.with_transform`, or call `open` for one cell.

    Args:
        images: Opens images by path.
        resize_policy: A name of `resizing.RESIZE_POLICIES`, applied as an image is opened.
        min_side: The least side of an image in pixels; see `resizing.ensure_min_side`.
    """

    def __init__(self, images: ImageSource, resize_policy: str = "processor", min_side: int = MIN_SIDE) -> None:
        self._images, self._options = images, ImageOptions(resize=resize_policy, min_side=min_side)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[dict[str, Any]]]:
        """Open a batch of rows, given column by column.

        Raises:
            ImageError: An image cannot be opened.
        """
        return {column: [self.open(cell) for cell in cells] for column, cells in batch.items()}

    def open(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """Open one cell.

        Args:
            cell: `{"text": str, "image": [path, …]}`.

        Returns:
            `{"text": str, "image": PIL image or list of them}`, without the keys that the cell does not have.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: The cell has another key.
        """
        text, paths = read_cell(cell)
        return open_input(self._images, text or "", paths, self._options)


def training_dataset(data: TrainingData, sampling: Sampling | Sequence[Sampling], seed: int = 0) -> TrainingSet:
    """Build the dataset of one or several sampled subsets.

    Args:
        data: The opened training data; subsets without a sampling file are left out.
        sampling: What `read_sampling` returned, once or several times; all of one method and one k.
        seed: The seed for negatives that are drawn at random from the subset, where a query has fewer than k.

    Returns:
        The dataset, its clusters, and how many negatives were drawn.

    Raises:
        DataError: A table is damaged.
        SamplingError: A subset is not in the data, a file was made with other rows, the files differ in method or k,
            or a subset of `hn` or `hn-beta` has a single candidate.
    """
    import datasets

    samplings = _alike(sampling)
    by_name = {subset.name: subset for subset in data.subsets}
    parts = []
    for number, one in enumerate(samplings):
        name = one.record["subset"]
        if name not in by_name:
            raise SamplingError(
                f"{one.path}: subset {name!r} is not in the training data, which has {', '.join(by_name)}; "
                "pass the data that was sampled"
            )
        parts.append(_Part(by_name[name], one, np.random.default_rng((seed, number))))
    columns = {name: [cell for part in parts for cell in part.columns[name]] for name in parts[0].columns}
    cell = {"text": datasets.Value("string"), "image": datasets.List(datasets.Value("string"))}
    features = datasets.Features(dict.fromkeys(columns, cell))
    dataset = datasets.Dataset.from_dict(
        {name: [{"text": item.text, "image": list(item.images)} for item in items] for name, items in columns.items()},
        features=features,
    )
    offsets = np.cumsum([0, *(part.num_rows for part in parts)])
    numbers: dict[Item, int] = {}
    positives = [numbers.setdefault(item, len(numbers)) for item in columns["positive"]]
    clusters = DatasetClusters(
        tuple(one.record["subset"] for one in samplings),
        np.concatenate([np.where(part.rows < 0, -1, part.rows + at) for part, at in zip(parts, offsets, strict=False)]),
        np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts]),
        int(offsets[-1]),
        np.array(positives, dtype=np.int64),
    )
    return TrainingSet(dataset, clusters, sum(part.num_drawn for part in parts))


class _Part:
    """One subset as columns, and its clusters in rows of them.

    Attributes:
        columns: The items of each column.
        rows: (C, width) int64 rows of these columns, -1 where a cluster is short.
        num_drawn: As in `TrainingSet`.
    """

    def __init__(self, subset: TrainingSubset, sampling: Sampling, rng: np.random.Generator) -> None:
        ids = _row_ids(sampling)
        used = np.unique(ids[ids >= 0])
        pairs = _read(subset, sampling, used)
        self.num_drawn = 0
        if sampling.record["method"] in PAIRS:
            # Short clusters have -1 in `ids`, which stays -1.
            self.rows = np.where(ids < 0, -1, np.searchsorted(used, ids))
            kept = used.tolist()
            self.columns = {"query": [pairs[row][0] for row in kept], "positive": [pairs[row][1] for row in kept]}
            return
        self.rows = np.arange(len(ids), dtype=np.int64)[:, None]
        anchors = ids[:, 0].tolist()
        self.columns = {"query": [pairs[row][0] for row in anchors], "positive": [pairs[row][1] for row in anchors]}
        k = ids.shape[1] - 1
        deck = list(dict.fromkeys(pairs[row][1] for row in used.tolist()))
        order = rng.permutation(len(deck)).tolist()
        lists = []
        for number, members in enumerate(ids[:, 1:].tolist()):
            own = [pairs[row][1] for row in members if row >= 0]
            positive = self.columns["positive"][number]
            self.num_drawn += k - len(own)
            lists.append(_topped_up(own, positive, k, (deck[card] for card in _from(order, number))))
            if len(lists[-1]) < k:
                raise SamplingError(f"{sampling.path}: all rows have one candidate, so there are no negatives")
        self.columns |= {f"negative_{place + 1}": [chosen[place] for chosen in lists] for place in range(k)}

    @property
    def num_rows(self) -> int:
        """The number of rows of this part."""
        return len(self.columns["query"])


def _read(subset: TrainingSubset, sampling: Sampling, used: npt.NDArray[np.int64]) -> dict[int, tuple[Item, Item]]:
    """Return query and positive of the rows that are used, by row id."""
    wanted = set(used.tolist())
    digest = RowsDigest()
    pairs: dict[int, tuple[Item, Item]] = {}
    for row in subset.rows():
        digest.add(row)
        if not isinstance(row, BadRow) and row.index in wanted:
            pairs[row.index] = (row.query, row.positive)
    sampling.require_data(digest.hexdigest())
    return pairs


def _from(order: list[int], start: int) -> Iterable[int]:
    """Yield a shuffled order from `start` on, and then from its beginning: each row begins at another place."""
    cut = start % len(order)
    yield from order[cut:]
    yield from order[:cut]


def _topped_up(own: list[Item], positive: Item, k: int, deck: Iterable[Item]) -> list[Item]:
    """Return a row's own negatives, and others from the shuffled candidates up to k; too few of them are repeated."""
    chosen = list(own)
    for card in deck:
        if len(chosen) == k:
            return chosen
        if card != positive and card not in chosen:
            chosen.append(card)
    if chosen:
        again = cycle(tuple(chosen))
        chosen += [next(again) for _ in range(k - len(chosen))]
    return chosen


def _row_ids(sampling: Sampling) -> npt.NDArray[np.int64]:
    """Return row ids, (C, k + 1) even if all clusters are short: the anchor first, -1 where a member is missing."""
    clusters = sampling.clusters
    ids = np.full((len(clusters.anchors), sampling.record["settings"]["num_hard_negatives"] + 1), -1, dtype=np.int64)
    ids[:, 0] = clusters.anchors
    ids[:, 1 : 1 + clusters.members.shape[1]] = clusters.members
    return ids


def _alike(sampling: Sampling | Sequence[Sampling]) -> list[Sampling]:
    """Return one or several sampling files as a list: at least one, all of one method and one k."""
    samplings = [sampling] if isinstance(sampling, Sampling) else list(sampling)
    if not samplings:
        raise SamplingError("no sampling file; pass what gen2embed sample wrote")
    kinds = [(one.record["method"], one.record["settings"]["num_hard_negatives"]) for one in samplings]
    for one, kind in zip(samplings, kinds, strict=True):
        if kind != kinds[0]:
            raise SamplingError(
                f"{one.path}: method {kind[0]} with k = {kind[1]}, but {samplings[0].path}: method {kinds[0][0]} with "
                f"k = {kinds[0][1]}; sample all subsets alike"
            )
    return samplings
