"""The distinct queries and positives of a dataset, and which belong together.

Two inputs with the same text and image are one point, whatever the names of the files. As in the paper's Fig. 4, the
candidates are the positives alone; the many other candidates that MMEB lists for a row are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gen2embed_mteb.analysis.inputs import candidate_side, rows_of
from gen2embed_mteb.analysis.options import DataOptions
from gen2embed_mteb.analysis.space.numbers import Pairs, Vectors
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Fault, Item
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RowError
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers
from gen2embed_mteb.mmeb.tables import SubsetTable
from gen2embed_mteb.names import Side


class PlannedPair(NamedTuple):
    """A row's query and its positive."""

    row: int
    query: Item
    positive: Item


@dataclass(frozen=True)
class DatasetRows:
    """The rows of a dataset.

    Attributes:
        dataset: The dataset.
        side: The side on which its candidates are encoded.
        pairs: The rows that could be read.
        errors: The others.
    """

    dataset: DatasetInfo
    side: Side
    pairs: tuple[PlannedPair, ...]
    errors: tuple[RowError, ...]

    @classmethod
    def read(cls, dataset: DatasetInfo, table: SubsetTable, options: DataOptions) -> DatasetRows:
        """Read the first rows of a dataset.

        Args:
            dataset: The dataset.
            table: Its table.
            options: How many rows, and the limits of each.

        Raises:
            Gen2EmbedError: No row can be used.
        """
        pairs, errors = [], []
        for row in rows_of(dataset, table, options, options.limit):
            if isinstance(row, RowError):
                errors.append(row)
            else:
                pairs.append(PlannedPair(row.index, row.query, row.candidates[0]))
        if not pairs:
            raise Gen2EmbedError(f"{dataset.name}: no row can be used; the first reason: {_first(errors)}")
        return cls(dataset, candidate_side(dataset), tuple(pairs), tuple(errors))


@dataclass(frozen=True)
class Points:
    """The distinct queries and candidates of a dataset that have a vector.

    Attributes:
        queries: The queries.
        candidates: The candidates.
        pairs: (p, 2) int64, distinct: numbers of a query and of its positive.
        query_vectors: (n, d) float32 unit rows.
        candidate_vectors: (m, d) float32 unit rows.
        errors: Rows that were set aside.
    """

    queries: tuple[Item, ...]
    candidates: tuple[Item, ...]
    pairs: Pairs
    query_vectors: Vectors
    candidate_vectors: Vectors
    errors: tuple[RowError, ...]

    @property
    def classes(self) -> list[int]:
        """The number of the first positive of each query."""
        found = dict(zip(*self.pairs[::-1].T.tolist(), strict=True))
        return [found[number] for number in range(len(self.queries))]


def encode(bulk: BulkEncoder, rows: DatasetRows) -> Points:
    """Encode the inputs of a dataset, each distinct one once.

    Args:
        bulk: Encodes them with one prompt, and keeps the vectors.
        rows: The rows.

    Raises:
        Gen2EmbedError: No row has a vector on both sides.
    """
    name, side = rows.dataset.name, rows.side
    bulk.add("query", [pair.query for pair in rows.pairs], f"{name} query")
    bulk.add(side, [pair.positive for pair in rows.pairs], f"{name} {side}")
    errors = list(rows.errors)
    queries, candidates = _Distinct(bulk), _Distinct(bulk)
    pairs: dict[tuple[int, int], None] = {}
    for pair in rows.pairs:
        fault: Fault | None = bulk.fault("query", pair.query) or bulk.fault(side, pair.positive)
        if fault is not None:
            errors.append(RowError(name, pair.row, fault.file, fault.reason))
        else:
            pairs.setdefault((queries.number(pair.query), candidates.number(pair.positive)))
    if not pairs:
        raise Gen2EmbedError(f"{name}: no row has a vector on both sides; the first reason: {_first(errors)}")
    return Points(
        queries=tuple(queries.items),
        candidates=tuple(candidates.items),
        pairs=np.array(list(pairs), dtype=np.int64),
        query_vectors=bulk.vectors("query", queries.items),
        candidate_vectors=bulk.vectors(side, candidates.items),
        errors=tuple(sorted(errors, key=lambda error: error.row)),
    )


class _Distinct:
    """Numbers items by their content, in the order in which they come."""

    def __init__(self, bulk: BulkEncoder) -> None:
        self.items: list[Item] = []
        self._bulk = bulk
        self._numbers: dict[tuple[str, tuple[str, ...]], int] = {}

    def number(self, item: Item) -> int:
        """Return the number of an item."""
        found = self._numbers.setdefault(self._bulk.content(item), len(self.items))
        if found == len(self.items):
            self.items.append(item)
        return found


def kind_of(items: Iterable[Item]) -> str:
    """Return what items consist of, for people: "text", "image", "image + text", or "mixed"."""
    kinds = {(bool(item.images), bool(drop_unmatched_markers(item.text, 0).strip())) for item in items}
    names = {(True, True): "image + text", (True, False): "image", (False, True): "text", (False, False): "nothing"}
    return names[kinds.pop()] if len(kinds) == 1 else "mixed"


def _first(errors: list[RowError]) -> str:
    return errors[0].reason if errors else "the table is empty"
