"""The evaluation run on a benchmark of MMEB's form.

1. Open every table and check its columns before anything is encoded.
2. For each dataset, read the rows, encode the queries and candidates that are new (also across datasets, see
   `bulk/encoder.py`), prepare their vectors for comparing (`comparison.py`), score each row, and set rejected rows
   aside.
3. Write the reports, even if too many rows were rejected; the result tells the caller.

If the run is killed and started again, it finds its shards, and writes the same `results.json` except for `seconds`.

Cost: one pass over each table. While a dataset is scored, its distinct items and their vectors are in memory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.types import Encoder, Fault, Item
from gen2embed_mteb.config import OWN, EvaluationConfig
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.embedder.affine_map import AffineMap
from gen2embed_mteb.evaluation.applied_calibration import stored_map, warn_about_prompts
from gen2embed_mteb.evaluation.run import (
    ROWS_SEARCHED,
    RowError,
    image_source,
    is_first_process,
    open_bulk_encoder,
    refuse_images,
)
from gen2embed_mteb.evaluation.run_folder import check_reports
from gen2embed_mteb.mmeb.comparison import Comparison, compare, first_of_each, require_own_inputs
from gen2embed_mteb.mmeb.datasets import Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.readers import BadRow, EvalRow, eval_columns, read_eval_rows
from gen2embed_mteb.mmeb.report import write_reports
from gen2embed_mteb.mmeb.reranking import Judge, RankedRow, Reranking
from gen2embed_mteb.mmeb.scoring import (
    DatasetReranking,
    DatasetScore,
    EvaluationResult,
    RowScore,
    score_row,
    warn_about_ties,
)
from gen2embed_mteb.mmeb.tables import SubsetTable, open_subsets
from gen2embed_mteb.names import Side

logger = logging.getLogger(__name__)


def evaluate(
    encoder: Encoder,
    benchmark: Benchmark,
    config: EvaluationConfig,
    share: Share | None = None,
    embedding_dir: Path | None = None,
    *,
    judge: Judge | None = None,
) -> EvaluationResult:
    """Run a benchmark and write its reports into `config.output_dir`.

    Args:
        encoder: The model.
        benchmark: MMEB, or another of its form.
        config: The run's settings.
        share: The part of the encoding that belongs to this process; None reads it from the environment.
        embedding_dir: The folder of the vectors; None stands for a folder in the output folder.
        judge: What reranks the best candidates, where `config.rerank` is set (see `reranking.open_judge`).

    Returns:
        The result; check its `too_many_errors`.

    Raises:
        DataError: A dataset or a column is missing, or a file is damaged.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: The model takes text alone, and a dataset has images; or the settings ask for a calibration
            that cannot be read, that does not fit the vectors, or that is fitted on a dataset's own inputs, of which
            there are too few.
        ForeignFileError: The output folder holds files with the names of ours that we did not write.
        StoreMismatchError: The output folder belongs to another model, prompt or run.
        ValueError: A dataset or meta-task is unknown.
    """
    start = time.monotonic()
    chosen = benchmark.select(config.subsets, config.meta_tasks)
    check_reports(config, benchmark.name, chosen.names)
    tables = open_subsets(config.data_dir, chosen.datasets, config.split)
    for dataset, table in tables:
        table.require(eval_columns(dataset, table.columns))
        if config.calibration == OWN:
            require_own_inputs(dataset, table, config)
    stored = stored_map(config)
    refuse_images(getattr(encoder, "text_alone", ""), images_in(tables, config.limit, config))
    images, folder = image_source(config), embedding_dir or config.vectors_folder
    bulk = open_bulk_encoder(encoder, config, images, folder=folder, fingerprint=config.fingerprint, share=share)
    of_datasets = {dataset.name: bulk.for_dataset(dataset.name) for dataset, _ in tables}
    warn_about_prompts(config, [name for name, one in of_datasets.items() if one is not bulk])
    reranking = None if judge is None else Reranking(judge, bulk, images, config, share)
    scores: list[DatasetScore] = []
    reranked: list[DatasetReranking] = []
    errors: list[RowError] = []
    for dataset, table in tables:
        score, rejected, ranked = _evaluate_dataset(of_datasets[dataset.name], dataset, table, config, stored)
        if reranking is not None:
            found, more = reranking.dataset(dataset, ranked)
            reranked.append(found)
            rejected = sorted([*rejected, *more], key=lambda error: error.row)
        scores.append(score)
        errors.extend(rejected)
        warn_about_ties(score)
        logger.info(
            "%s: P@1 %s (%d rows, %d set aside)", dataset.name, score.precision_at_1, len(score.rows), len(rejected)
        )
    result = EvaluationResult(
        benchmark=chosen,
        scores=tuple(scores),
        reranked=tuple(reranked),
        num_scored=sum(len(score.rows) for score in scores),
        errors=tuple(errors),
        seconds=time.monotonic() - start,
        max_error_rate=config.max_error_rate,
    )
    output_dir = Path(config.output_dir)
    if is_first_process():
        write_reports(result, config)
    if errors:
        logger.warning("%d rows were set aside; see %s", len(errors), output_dir / "errors.jsonl")
    return result


def images_in(
    tables: Sequence[tuple[DatasetInfo, SubsetTable]], limit: int | None = None, limits: RowLimits | None = None
) -> dict[str, Callable[[], bool]]:
    """Return, for each dataset by name, what tells whether one of its first rows has an image.

    Args:
        tables: The opened datasets.
        limit: As in `read_eval_rows`.
        limits: Likewise.
    """

    def look(dataset: DatasetInfo, table: SubsetTable) -> bool:
        rows = read_eval_rows(table, dataset, min(limit or ROWS_SEARCHED, ROWS_SEARCHED), limits)
        good = (row for row in rows if not isinstance(row, BadRow))
        return any(item.images for row in good for item in (row.query, *row.candidates))

    return {dataset.name: partial(look, dataset, table) for dataset, table in tables}


@dataclass(frozen=True)
class _PlannedRow:
    """A row whose items are numbers, to save memory: a dataset of MMEB lists a million candidates, mostly repeated."""

    index: int
    query: int
    candidates: np.ndarray


class _Plan:
    """The rows of one dataset, and its distinct items per side."""

    def __init__(self, dataset: DatasetInfo, table: SubsetTable, config: EvaluationConfig) -> None:
        self.candidate_side: Side = "query" if dataset.candidates_as_queries else "document"
        self.rows: list[_PlannedRow] = []
        self.rejected: list[BadRow] = []
        self._numbers: dict[Side, dict[Item, int]] = {"query": {}, "document": {}}
        for row in read_eval_rows(table, dataset, config.limit, config):
            if isinstance(row, BadRow):
                self.rejected.append(row)
            else:
                self.rows.append(self._planned(row))
        self.items: dict[Side, list[Item]] = {side: list(known) for side, known in self._numbers.items()}

    def ranked(self, row: _PlannedRow, score: RowScore, file: str) -> RankedRow:
        """Return a scored row with its best candidates."""
        candidates = self.items[self.candidate_side]
        places = [] if score.top is None else row.candidates[score.top.places].tolist()
        chosen = tuple(candidates[number] for number in places)
        return RankedRow(row.index, file, self.items["query"][row.query], chosen, score)

    def _planned(self, row: EvalRow) -> _PlannedRow:
        queries, candidates = self._numbers["query"], self._numbers[self.candidate_side]
        query = queries.setdefault(row.query, len(queries))
        numbers = [candidates.setdefault(item, len(candidates)) for item in row.candidates]
        return _PlannedRow(row.index, query, np.array(numbers, dtype=np.int64))


def _evaluate_dataset(
    bulk: BulkEncoder, dataset: DatasetInfo, table: SubsetTable, config: EvaluationConfig, stored: AffineMap | None
) -> tuple[DatasetScore, list[RowError], list[RankedRow]]:
    plan = _Plan(dataset, table, config)
    for side, items in plan.items.items():
        bulk.add(side, items, f"{dataset.name} {side}")
    rejected = [RowError(dataset.name, bad.index, bad.file, bad.reason) for bad in plan.rejected]
    scores: list[RowScore] = []
    ranked: list[RankedRow] = []
    found = _Found(bulk, plan)
    comparison = found.compare(dataset.name, config, stored)
    for row, outcome in _score_rows(plan, found, comparison, config.rerank_top if config.rerank else None):
        if isinstance(outcome, Fault):
            rejected.append(RowError(dataset.name, row.index, outcome.file or table.file_of(row.index), outcome.reason))
        else:
            scores.append(outcome)
            if outcome.top is not None:
                ranked.append(plan.ranked(row, outcome, table.file_of(row.index)))
    rejected.sort(key=lambda error: error.row)
    return DatasetScore(dataset, tuple(scores), len(rejected), comparison.num_unlabelled), rejected, ranked


class _Found:
    """The vectors of a plan's items as they were encoded, per side, and the faults of those that have none."""

    def __init__(self, bulk: BulkEncoder, plan: _Plan) -> None:
        self.faults: dict[Side, dict[int, Fault]] = {}
        self.vectors: dict[Side, np.ndarray] = {}
        self.places: dict[Side, np.ndarray] = {}
        self._bulk, self._plan = bulk, plan
        self._good: dict[Side, list[Item]] = {}
        for side, items in plan.items.items():
            found = [bulk.fault(side, item) for item in items]
            self.faults[side] = {number: fault for number, fault in enumerate(found) if fault}
            good = [number for number, fault in enumerate(found) if not fault]
            self._good[side] = [items[number] for number in good]
            self.vectors[side] = bulk.vectors(side, self._good[side])
            self.places[side] = np.full(len(items), -1, dtype=np.int64)
            self.places[side][good] = np.arange(len(good))

    def compare(self, name: str, config: EvaluationConfig, stored: AffineMap | None) -> Comparison:
        """Prepare the vectors for comparing; see `comparison.compare`."""
        if not config.comparison:
            return Comparison(self.vectors)
        contents = {side: [self._bulk.content(item) for item in items] for side, items in self._good.items()}
        distinct: dict[Side, np.ndarray] = {side: first_of_each(found) for side, found in contents.items()}
        queries = self.places["query"][np.array([row.query for row in self._plan.rows], dtype=np.int64)]
        queries = queries[queries >= 0]
        queries = queries[first_of_each([contents["query"][place] for place in queries.tolist()])]
        return compare(
            name,
            self.vectors,
            distinct=distinct,
            queries=queries,
            candidate_side=self._plan.candidate_side,
            config=config,
            stored=stored,
        )


def _score_rows(
    plan: _Plan, found: _Found, comparison: Comparison, top_k: int | None
) -> Iterator[tuple[_PlannedRow, RowScore | Fault]]:
    """Score every planned row; for a row with an item that has no vector, on either side, yield that item's fault."""
    side, faults, vectors, places = plan.candidate_side, found.faults, comparison.vectors, found.places
    for row in plan.rows:
        bad = next((faults[side][number] for number in row.candidates.tolist() if number in faults[side]), None)
        fault = faults["query"].get(row.query) or bad
        if fault:
            yield row, fault
            continue
        candidates = places[side][row.candidates]
        yield (
            row,
            score_row(
                vectors["query"][places["query"][row.query]],
                vectors[side][candidates],
                row.candidates == row.candidates[0],
                None if comparison.hubs is None else comparison.hubs[candidates],
                numbers=row.candidates,
                top_k=top_k,
            ),
        )
