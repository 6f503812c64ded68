"""The rows of a sampled subset that training uses: each query with its positives and its negatives.

An entry is a row of the data. It becomes one row of the dataset for each of its positives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from trainers.data.training_data import TrainingSubset
from trainers.sampling.files import RowsDigest, Sampling, SamplingError

PAIRS = ("saha", "in-batch")
"""The methods whose clusters are made of pairs; the others have their negatives as extra candidates."""

EXPLICIT = 8
"""How many explicit negatives of a row are used at most, if nothing else is said."""


@dataclass(frozen=True)
class Entry:
    """A row of the data with its negatives.

    Attributes:
        query: The query.
        positives: Its positives, at least one.
        explicit: Its explicit negatives.
        mined: Its mined negatives, k of them; none where clusters are made of pairs.
    """

    query: Item
    positives: tuple[Item, ...]
    explicit: tuple[Item, ...]
    mined: tuple[Item, ...] = ()


class Row(NamedTuple):
    """A row of the dataset: a query, one of its positives, all of them, and its negatives, None where one lacks."""

    query: Item
    positive: Item
    positives: tuple[Item, ...]
    negatives: tuple[Item | None, ...]


def as_rows(entries: Sequence[Entry], most: int) -> list[Row]:
    """Return the rows of the dataset: explicit negatives first, padded to one number, then mined ones.

    Args:
        entries: The entries.
        most: How many explicit negatives of a row are taken at most, the first ones.
    """
    explicit = min(most, max((len(entry.explicit) for entry in entries), default=0))
    rows = []
    for entry in entries:
        own: list[Item | None] = [*entry.explicit[:explicit]]
        own += [None] * (explicit - len(own))
        rows += [Row(entry.query, one, entry.positives, (*own, *entry.mined)) for one in entry.positives]
    return rows


def candidates_of(rows: Sequence[Row]) -> dict[str, list[Item | None]]:
    """Return the columns of candidates by name."""
    count = len(rows[0].negatives) if rows else 0
    columns: dict[str, list[Item | None]] = {"positive": [row.positive for row in rows]}
    return columns | {f"negative_{place + 1}": [row.negatives[place] for row in rows] for place in range(count)}


class Part:
    """One subset as entries, and its clusters in numbers of them.

    Attributes:
        entries: The entries.
        rows: (C, width) int64 numbers of entries, -1 where a cluster is short.
        num_drawn: How many negatives were drawn because a query had fewer than k of its own.
    """

    def __init__(self, subset: TrainingSubset, sampling: Sampling, rng: np.random.Generator) -> None:
        """Read the subset.

        Args:
            subset: The subset.
            sampling: Its clusters.
            rng: Draws negatives.

        Raises:
            SamplingError: The clusters are not of this data, or all rows have one candidate.
        """
        ids = row_ids(sampling)
        used = np.unique(ids[ids >= 0])
        found = _read(subset, sampling, used)
        self.num_drawn = 0
        if sampling.record["method"] in PAIRS:
            # Short clusters have -1 in `ids`, which stays -1.
            self.rows = np.where(ids < 0, -1, np.searchsorted(used, ids))
            kept = [found[row] for row in used.tolist()]
            self.entries = [Entry(row.query, row.positives, row.negatives) for row in kept]
            return
        self.rows = np.arange(len(ids), dtype=np.int64)[:, None]
        k = ids.shape[1] - 1
        deck = list(dict.fromkeys(positive for row in used.tolist() for positive in found[row].positives))
        order = rng.permutation(len(deck)).tolist()
        places = np.zeros(ids[:, 1:].shape, dtype=np.int64)
        if sampling.clusters.places is not None:
            places[:, : sampling.clusters.places.shape[1]] = sampling.clusters.places
        self.entries = []
        for number, (anchor, *members) in enumerate(ids.tolist()):
            row = found[anchor]
            named = zip(members, places[number].tolist(), strict=True)
            own = [_positive(found[member], place, sampling) for member, place in named if member >= 0]
            self.num_drawn += k - len(own)
            others = (deck[card] for card in _from(order, number))
            mined = _topped_up(own, {*row.positives, *row.negatives}, k, others)
            if len(mined) < k:
                raise SamplingError(f"{sampling.path}: all rows have one candidate, so there are no negatives")
            self.entries.append(Entry(row.query, row.positives, row.negatives, tuple(mined)))


def _positive(row: TrainRow, place: int, sampling: Sampling) -> Item:
    if place >= len(row.positives):
        raise SamplingError(f"{sampling.path}: names positive {place} of row {row.index}; run gen2embed sample again")
    return row.positives[place]


def _read(subset: TrainingSubset, sampling: Sampling, used: npt.NDArray[np.int64]) -> dict[int, TrainRow]:
    """Return the rows that are used, by row id."""
    wanted = set(used.tolist())
    digest = RowsDigest()
    found: dict[int, TrainRow] = {}
    for row in subset.rows():
        digest.add(row)
        if not isinstance(row, BadRow) and row.index in wanted:
            found[row.index] = row
    sampling.require_data(digest.hexdigest())
    return found


def _from(order: list[int], start: int) -> Iterable[int]:
    """Yield a shuffled order from `start` on, and then from its beginning: each row begins at another place."""
    cut = start % len(order)
    yield from order[cut:]
    yield from order[:cut]


def _topped_up(own: list[Item], known: set[Item], k: int, deck: Iterable[Item]) -> list[Item]:
    """Return a row's own negatives, and others from the shuffled candidates up to k; too few of them are repeated."""
    chosen = list(own)
    for card in deck:
        if len(chosen) == k:
            return chosen
        if card not in known and card not in chosen:
            chosen.append(card)
    if chosen:
        again = cycle(tuple(chosen))
        chosen += [next(again) for _ in range(k - len(chosen))]
    return chosen


def row_ids(sampling: Sampling) -> npt.NDArray[np.int64]:
    """Return row ids, (C, k + 1) even if all clusters are short: the anchor first, -1 where a member is missing."""
    clusters = sampling.clusters
    ids = np.full((len(clusters.anchors), sampling.record["settings"]["num_hard_negatives"] + 1), -1, dtype=np.int64)
    ids[:, 0] = clusters.anchors
    ids[:, 1 : 1 + clusters.members.shape[1]] = clusters.members
    return ids
