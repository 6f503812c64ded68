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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.config import OWN, EvaluationConfig
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
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
from gen2embed_mteb.mmeb.comparison import require_own_inputs
from gen2embed_mteb.mmeb.datasets import Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.planned_rows import Found, Plan
from gen2embed_mteb.mmeb.readers import BadRow, eval_columns, read_eval_rows
from gen2embed_mteb.mmeb.report import write_reports
from gen2embed_mteb.mmeb.reranking.judge import Judge, RankedRow, Reranking
from gen2embed_mteb.mmeb.scoring import (
    DatasetReranking,
    DatasetScore,
    EvaluationResult,
    RowScore,
    score_row,
    warn_about_ties,
)
from gen2embed_mteb.mmeb.tables import SubsetTable, open_subsets

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


def _evaluate_dataset(
    bulk: BulkEncoder, dataset: DatasetInfo, table: SubsetTable, config: EvaluationConfig, stored: AffineMap | None
) -> tuple[DatasetScore, list[RowError], list[RankedRow]]:
    plan = Plan(dataset, table, config)
    for side, items in plan.items.items():
        bulk.add(side, items, f"{dataset.name} {side}")
    scores: list[RowScore] = []
    ranked: list[RankedRow] = []
    found = Found(bulk, plan)
    comparison = found.compare(config, stored)
    top_k = config.rerank_top if config.rerank else None
    for row, places in found.scorable():
        outcome = score_row(
            comparison.vectors["query"][places.query],
            comparison.vectors[plan.candidate_side][places.candidates],
            row.same_as_positive,
            None if comparison.hubs is None else comparison.hubs[places.candidates],
            numbers=row.candidates,
            top_k=top_k,
        )
        scores.append(outcome)
        if outcome.top is not None:
            ranked.append(plan.ranked(row, outcome))
    rejected = found.rejected()
    return DatasetScore(dataset, tuple(scores), len(rejected), comparison.num_unlabelled), rejected, ranked
