"""The rows of one dataset as numbers of its distinct items, and the vectors of these items.

`Plan` reads the rows; `Found` has the vectors after the items were encoded, and tells which rows can be scored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Fault, Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
from gen2embed_mteb.evaluation.run import RowError
from gen2embed_mteb.mmeb.comparison import Comparison, Vectors, calibrated, first_of_each, with_csls
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.readers import BadRow, EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.reranking.judge import RankedRow
from gen2embed_mteb.mmeb.scoring import RowScore
from gen2embed_mteb.mmeb.tables import SubsetTable
from gen2embed_mteb.names import Side


class Encoded(Protocol):
    """Items that were encoded; `BulkEncoder` is one."""

    def fault(self, side: Side, item: Item) -> Fault | None:
        """Return the reason why an item has no vector; `None` if it has one."""

    def content(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """Return what is equal for equal texts and images."""

    def vectors(self, side: Side, items: Sequence[Item]) -> Vectors:
        """Return the vectors of items without a fault, (n, d) float32."""


@dataclass(frozen=True)
class PlannedRow:
    """A row whose items are numbers, to save memory: a dataset of MMEB lists a million candidates, mostly repeated.

    Attributes:
        index: The row's number in its split, from 0.
        query: The number of the query among the plan's items of the side `query`.
        candidates: (n,) int64, those of the candidates among the items of the plan's `candidate_side`.
    """

    index: int
    query: int
    candidates: npt.NDArray[np.int64]

    @property
    def same_as_positive(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, true for each candidate that is the same input as candidate 0."""
        return np.asarray(self.candidates == self.candidates[0])


class Plan:
    """The rows of one dataset, and its distinct items per side.

    Args:
        dataset: The dataset.
        table: Its table.
        config: The run's settings, which limit the rows.

    Attributes:
        rows: The rows that can be used.
        rejected: The others.
        items: The distinct items per side.
        candidate_side: The side of the candidates.
    """

    def __init__(self, dataset: DatasetInfo, table: SubsetTable, config: EvaluationConfig) -> None:
        """Read the rows."""
        self.dataset, self.table = dataset, table
        self.candidate_side: Side = "query" if dataset.candidates_as_queries else "document"
        self.rows: list[PlannedRow] = []
        self.rejected: list[BadRow] = []
        self._numbers: dict[Side, dict[Item, int]] = {"query": {}, "document": {}}
        for row in read_eval_rows(table, dataset, config.limit, config):
            if isinstance(row, BadRow):
                self.rejected.append(row)
            else:
                self.rows.append(self._planned(row))
        self.items: dict[Side, list[Item]] = {side: list(known) for side, known in self._numbers.items()}

    def ranked(self, row: PlannedRow, score: RowScore) -> RankedRow:
        """Return a scored row with its best candidates."""
        candidates = self.items[self.candidate_side]
        places = [] if score.top is None else row.candidates[score.top.places].tolist()
        chosen = tuple(candidates[number] for number in places)
        return RankedRow(row.index, self.table.file_of(row.index), self.items["query"][row.query], chosen, score)

    def _planned(self, row: EvalRow) -> PlannedRow:
        queries, candidates = self._numbers["query"], self._numbers[self.candidate_side]
        query = queries.setdefault(row.query, len(queries))
        numbers = [candidates.setdefault(item, len(candidates)) for item in row.candidates]
        return PlannedRow(row.index, query, np.array(numbers, dtype=np.int64))


class Places(NamedTuple):
    """Where the vectors of a row are: the number of the query's row, and (n,) int64, those of the candidates."""

    query: int
    candidates: npt.NDArray[np.int64]


class Found:
    """The vectors of a plan's items as they were encoded, per side, and the faults of those that have none.

    Args:
        encoded: All items of the plan.
        plan: The plan.

    Attributes:
        vectors: (n, d) float32 per side, of the items without a fault.
    """

    def __init__(self, encoded: Encoded, plan: Plan) -> None:
        """Read the vectors."""
        self.vectors: Mapping[Side, Vectors] = {}
        self._encoded, self._plan = encoded, plan
        self._faults: dict[Side, dict[int, Fault]] = {}
        self._places: dict[Side, npt.NDArray[np.int64]] = {}
        self._good: dict[Side, list[Item]] = {}
        vectors: dict[Side, Vectors] = {}
        for side, items in plan.items.items():
            found = [encoded.fault(side, item) for item in items]
            self._faults[side] = {number: fault for number, fault in enumerate(found) if fault}
            good = [number for number, fault in enumerate(found) if not fault]
            self._good[side] = [items[number] for number in good]
            vectors[side] = encoded.vectors(side, self._good[side])
            self._places[side] = np.full(len(items), -1, dtype=np.int64)
            self._places[side][good] = np.arange(len(good))
        self.vectors = vectors

    def with_vectors(self, vectors: Mapping[Side, Vectors]) -> Found:
        """Return the same items with other vectors.

        Args:
            vectors: (n, d) float32 per side, in the order of `self.vectors`.
        """
        other = copy.copy(self)
        other.vectors = vectors
        return other

    def compare(self, config: EvaluationConfig, stored: AffineMap | None) -> Comparison:
        """Prepare the vectors for comparing.

        Args:
            config: The run's settings.
            stored: The map of the calibrated folder, if the settings name one.
        """
        found = self.calibrated(config, stored).cut(config.truncate_dim)
        return found if config.scoring == "cosine" else self.with_csls(found, config)

    def calibrated(self, config: EvaluationConfig, stored: AffineMap | None) -> Comparison:
        """Apply the calibration that the settings name; see `comparison.calibrated`."""
        if not config.calibration:
            return Comparison(self.vectors)
        distinct = {side: first_of_each(self._contents(side)) for side in self._good}
        return calibrated(self._plan.dataset.name, self.vectors, distinct=distinct, config=config, stored=stored)

    def with_csls(self, comparison: Comparison, config: EvaluationConfig) -> Comparison:
        """Add CSLS's correction to vectors that were prepared so far; see `comparison.with_csls`."""
        contents = self._contents("query")
        queries = self._places["query"][np.array([row.query for row in self._plan.rows], dtype=np.int64)]
        queries = queries[queries >= 0]
        queries = queries[first_of_each([contents[place] for place in queries.tolist()])]
        return with_csls(comparison, queries, self._plan.candidate_side, config.csls_neighbors)

    def scorable(self) -> Iterator[tuple[PlannedRow, Places]]:
        """Return the rows of which every item has a vector, in order, and where the vectors are."""
        side = self._plan.candidate_side
        for row in self._plan.rows:
            if self._fault(row) is None:
                yield row, Places(int(self._places["query"][row.query]), self._places[side][row.candidates])

    def rejected(self) -> list[RowError]:
        """Return all other rows, in order."""
        name, table = self._plan.dataset.name, self._plan.table
        errors = [RowError(name, bad.index, bad.file, bad.reason) for bad in self._plan.rejected]
        for row in self._plan.rows:
            fault = self._fault(row)
            if fault is not None:
                errors.append(RowError(name, row.index, fault.file or table.file_of(row.index), fault.reason))
        return sorted(errors, key=lambda error: error.row)

    def _fault(self, row: PlannedRow) -> Fault | None:
        """Return the fault of a row's query, or of the first candidate that has one."""
        candidates = self._faults[self._plan.candidate_side]
        bad = (candidates[number] for number in row.candidates.tolist() if number in candidates) if candidates else ()
        return self._faults["query"].get(row.query) or next(iter(bad), None)

    def _contents(self, side: Side) -> list[tuple[str, tuple[str, ...]]]:
        return [self._encoded.content(item) for item in self._good[side]]
