"""Turns sampling files into what a trainer reads: a `datasets.Dataset` of pairs, and the clusters in rows of it.

    method of the file       columns                                       a row is      a cluster is
    saha                     query, positive                               a pair        an anchor and its k members
    in-batch                 query, positive                               a pair        the pair alone
    hn, hn-beta              query, positive, negative_1, …, negative_k    a query       the row alone

Plain hard negatives are extra candidates of one query, not pairs, hence columns. A column's name must not be the
beginning of another's (sentence-transformers collects features by prefix), so none is called plain `negative`.

Explicit negatives of the data are columns of every method: `negative_1, …, negative_n`, before mined ones, which they
do not replace; n is that of the row with the most, up to a limit. A row with fewer has empty cells. A query with
several positives has a row for each of them, one behind the other; clusters name the first, and the sampler takes one
of them per epoch. What a loss must know of the others is in the cells (`stated_facts.py`). `SahaTrainer` reads both;
other trainers cannot take empty cells: pass `explicit_negatives=0` for them.

A cell is `{"text": str, "image": [path, …]}`: no image is opened before a row is used. `SahaTrainer` opens the cells of
a batch when the batch is made. For other trainers `OpenInputs` opens them, and leaves out the keys that a row does not
have, as the stock collator needs it.

Only rows that occur in a cluster become rows of the dataset: those that sampling set aside cannot be read. Building the
dataset takes one pass over the rows of each subset, and keeps the texts and paths of the rows in use in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.images.resizing import MIN_SIDE, ImageOptions
from gen2embed_mteb.images.source import ImageSource, open_input
from trainers.batches.entries import EXPLICIT, PAIRS, Part, as_rows, candidates_of, row_ids
from trainers.batches.stated_facts import CANDIDATE_NUMBER, KNOWN_POSITIVES, UNNUMBERED, without_facts
from trainers.data.cells import read_cell
from trainers.data.training_data import TrainingData
from trainers.sampling.files import Sampling, SamplingError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False, repr=False)
class DatasetClusters:
    """Clusters in rows of a dataset, which is the concatenation of one or several subsets.

    Attributes:
        names: The names of the subsets.
        rows: (C, k + 1) int64 rows of the dataset, the anchor first, -1 where a cluster is short.
        subsets: (C,) int64, the index of each cluster's subset in `names`.
        num_rows: The number of rows of the dataset.
        positives: (num_rows,) int64, equal where positives are equal; None if it is not known which are equal.
        sizes: (num_rows,) int64, at the first row of each query the number of its rows, one per positive, and 0 at the
            others; None where every query has one row. `rows` are first rows.
    """

    names: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    subsets: npt.NDArray[np.int64]
    num_rows: int
    positives: npt.NDArray[np.int64] | None = None
    sizes: npt.NDArray[np.int64] | None = None

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
        rows = [row_ids(one) for one in samplings]
        return cls(
            tuple(one.record["subset"] for one in samplings),
            np.concatenate([np.where(ids < 0, -1, ids + start) for ids, start in zip(rows, offsets, strict=False)]),
            np.repeat(np.arange(len(rows)), [len(ids) for ids in rows]),
            int(offsets[-1]),
        )

    def of_epoch(self, seed: int, epoch: int) -> npt.NDArray[np.int64] | None:
        """Return which row of each query an epoch takes: (num_rows,) int64, what is added to its first row.

        Each query begins at a positive of its own, drawn by the seed, and goes on to the next one in each epoch. So in
        as many epochs as it has positives each comes once.

        Args:
            seed: The seed of the run.
            epoch: The epoch, from 0.

        Returns:
            The numbers; None where every query has one row.
        """
        if self.sizes is None:
            return None
        starts = np.random.default_rng((seed, 0, 1)).integers(0, 2**31, self.num_rows)
        return (starts + epoch) % np.maximum(self.sizes, 1)

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
        text, paths = read_cell(without_facts(cell))
        return open_input(self._images, text or "", paths, self._options)


def training_dataset(
    data: TrainingData, sampling: Sampling | Sequence[Sampling], seed: int = 0, explicit_negatives: int = EXPLICIT
) -> TrainingSet:
    """Build the dataset of one or several sampled subsets.

    Args:
        data: The opened training data; subsets without a sampling file are left out.
        sampling: What `read_sampling` returned, once or several times; all of one method and one k.
        seed: The seed for negatives that are drawn at random from the subset, where a query has fewer than k.
        explicit_negatives: How many of a row's explicit negatives are taken at most, the first ones.

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
        parts.append(Part(by_name[name], one, np.random.default_rng((seed, number))))
    entries = [entry for part in parts for entry in part.entries]
    several = any(len(entry.positives) > 1 for entry in entries)
    rows = as_rows(entries, explicit_negatives)
    numbers: dict[Item, int] = {}
    positives = [numbers.setdefault(row.positive, len(numbers)) for row in rows]
    cell: dict[str, Any] = {"text": datasets.Value("string"), "image": datasets.List(datasets.Value("string"))}
    stated: dict[str, Any] = {KNOWN_POSITIVES: datasets.List(datasets.Value("int64"))}
    features = {"query": {**cell, **stated} if several else cell}
    columns: dict[str, list[dict[str, Any]]] = {"query": []}
    for row in rows:
        known = {KNOWN_POSITIVES: [numbers[item] for item in row.positives]} if several else {}
        columns["query"].append({**_cell(row.query), **known})
    stated = {CANDIDATE_NUMBER: datasets.Value("int64")} if several else {}
    for name, items in candidates_of(rows).items():
        features[name] = {**cell, **stated}
        columns[name] = [_cell(item) for item in items]
        if several:  # a candidate that is nobody's positive needs no number
            for made, item in zip(columns[name], items, strict=True):
                made[CANDIDATE_NUMBER] = UNNUMBERED if item is None else numbers.get(item, UNNUMBERED)
    starts = np.cumsum([0, *(len(entry.positives) for entry in entries)])
    sizes = np.zeros(starts[-1], dtype=np.int64)
    sizes[starts[:-1]] = np.diff(starts)
    offsets = np.cumsum([0, *(len(part.entries) for part in parts)])
    in_entries = [np.where(part.rows < 0, -1, part.rows + at) for part, at in zip(parts, offsets, strict=False)]
    of_entries = np.concatenate(in_entries)
    clusters = DatasetClusters(
        tuple(one.record["subset"] for one in samplings),
        np.where(of_entries < 0, -1, starts[of_entries]),
        np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts]),
        len(rows),
        np.array(positives, dtype=np.int64),
        sizes if several else None,
    )
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return TrainingSet(dataset, clusters, sum(part.num_drawn for part in parts))


def _cell(item: Item | None) -> dict[str, Any]:
    return {"text": None, "image": []} if item is None else {"text": item.text, "image": list(item.images)}


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
