"""Reranking in an evaluation: the best candidates of each row are scored again by the generator of the same weights.

1. Rows are cut into shards of `ROWS_PER_SHARD`, a pure function of the rows. Shards that the store holds are reused;
   each process scores its share of the others, and waits for those of the other processes (see `bulk/processes.py`).
2. The candidates of a row are scored together (see `embedder/reranking/query_scorer.py`), and with those of no other
   row, so that a row's scores do not depend on which rows were scored before.
3. A row with a pair that cannot be scored is set aside, as a row that cannot be encoded is.

Cost: one forward pass for each of the k candidates of a row, without the query's part, which is run once per row.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.pair_store import PairStore, ScoredRow, ScoredShard
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.errors import is_of_the_system, one_line
from gen2embed_mteb.evaluation.run import RowError
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.source import ImageSource, open_input
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.scoring import DatasetReranking, DatasetScore, RowScore

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 32
FOLDER = "pair_scores"
"""The folder in the output folder of a run."""


@dataclass(frozen=True)
class Judge:
    """What scores pairs.

    Attributes:
        score: Scores the candidates of one query; see `QueryScorer.score`.
        framing: How it is asked.
        options: The two answers that it reads; None with `likelihood`.
        identity: The digest of all that decides its scores.
    """

    score: Any
    framing: str
    options: tuple[str, str] | None
    identity: str


def open_judge(model: Any, framing: str, fingerprint: str) -> Judge:
    """Return what reranks with the generator of an embedder.

    Args:
        model: A `Gen2Embed`.
        framing: How it is asked.
        fingerprint: The fingerprint of the model.

    Raises:
        Gen2EmbedError: There is no output layer, or the tokenizer cannot tell the answers apart.
    """
    from gen2embed_mteb.embedder.reranking.digest import reranker_digest
    from gen2embed_mteb.embedder.reranking.query_scorer import QueryScorer

    reranker = model.reranker(framing)
    options = reranker.framing.yes and (reranker._options[0])
    return Judge(QueryScorer(reranker).score, framing, options or None, reranker_digest(reranker, fingerprint))


@dataclass(frozen=True)
class RankedRow:
    """A row that was scored by the embedding.

    Attributes:
        index: Its number in the split.
        file: Its file, for messages.
        query: The query.
        candidates: The best candidates, the best first.
        score: The outcome by the embedding, with its `top`.
    """

    index: int
    file: str
    query: Item
    candidates: tuple[Item, ...]
    score: RowScore


class Reranking:
    """Reranks the datasets of one run.

    Args:
        judge: What scores pairs.
        bulk: Knows the content of every item, whatever the dataset.
        images: The source of the images.
        config: The run's settings.
        share: The part of the work that belongs to this process; None reads it from the environment.
    """

    def __init__(
        self, judge: Judge, bulk: BulkEncoder, images: ImageSource, config: EvaluationConfig, share: Share | None = None
    ) -> None:
        """Open the store."""
        self._judge, self._bulk, self._images, self._config = judge, bulk, images, config
        resizing = [config.resize, config.min_side, sorted(config.orientation().items())]
        self._store = PairStore(Path(config.output_dir) / FOLDER, f"{judge.identity} {resizing}")
        self._share = share or Share.from_environment()
        self._peers = Peers(self._share)

    def dataset(self, dataset: DatasetInfo, rows: Sequence[RankedRow]) -> tuple[DatasetReranking, list[RowError]]:
        """Rerank a dataset.

        Args:
            dataset: The dataset.
            rows: Its rows, in order; only the first `rerank_limit` are used.

        Returns:
            The outcome, and the rows that were set aside.
        """
        chosen = list(rows[: self._config.rerank_limit])
        if self._judge.framing == "likelihood" and any(item.images for row in chosen for item in row.candidates):
            nothing = DatasetScore(dataset, ())
            return DatasetReranking(nothing, nothing, skipped="likelihood takes texts, its candidates are images"), []
        shards = self._scored(
            [chosen[start : start + ROWS_PER_SHARD] for start in range(0, len(chosen), ROWS_PER_SHARD)]
        )
        scored = [row for shard in shards for row in shard.rows]
        before: list[RowScore] = []
        after: list[RowScore] = []
        rejected = []
        for row, found in zip(chosen, scored, strict=True):
            if found.fault or row.score.top is None:
                rejected.append(RowError(dataset.name, row.index, found.fault[0] or row.file, found.fault[1]))
                continue
            before.append(row.score)
            second = np.array(found.scores) + self._config.rerank_weight * row.score.top.scores
            after.append(RowScore(*row.score.top.reordered(second)))
        return (
            DatasetReranking(
                DatasetScore(dataset, tuple(before), len(rejected)),
                DatasetScore(dataset, tuple(after), len(rejected)),
                num_pairs=sum(len(row.scores) for row in scored),
                answers=sum(row.answers for row in scored),
                mass=sum(row.mass for row in scored),
                first=sum(row.first for row in scored),
                num_tokens=sum(row.num_tokens for row in scored),
                num_tokens_in_full=sum(row.num_tokens_in_full for row in scored),
                seconds=sum(shard.seconds for shard in shards),
            ),
            rejected,
        )

    def _scored(self, parts: list[list[RankedRow]]) -> list[ScoredShard]:
        """Return the scores of every part, from the store or made now."""
        from tqdm import tqdm

        keys = [self._store.key([self._work(row) for row in part]) for part in parts]
        counts = {key: [len(row.candidates) for row in part] for key, part in zip(keys, parts, strict=True)}
        work = dict(zip(keys, parts, strict=True))
        found = {key: shard for key in work if (shard := self._store.get(key, counts[key])) is not None}
        missing = {key: number for number, key in enumerate(work) if key not in found}
        silent = self._share.rank > 0 or not sys.stderr.isatty()
        with tqdm(total=len(missing) * ROWS_PER_SHARD, desc="reranking", unit="row", disable=silent) as bar:

            def make(key: str) -> None:
                found[key] = self._store.put(key, self._made(work[key]))
                bar.update(ROWS_PER_SHARD)

            for key in (key for key, number in missing.items() if self._share.owns(number)):
                make(key)
            others = {key: number for key, number in missing.items() if not self._share.owns(number)}
            for key, shard in self._peers.await_others(others, lambda key: self._store.get(key, counts[key])):
                if shard is None:
                    make(key)
                else:
                    found[key] = shard
        return [found[key] for key in keys]

    def _work(self, row: RankedRow) -> list[Any]:
        return [self._bulk.content(item) for item in (row.query, *row.candidates)]

    def _made(self, rows: list[RankedRow]) -> ScoredShard:
        started = time.monotonic()
        made = tuple(self._row(row) for row in rows)
        return ScoredShard(made, round(time.monotonic() - started, 3))

    def _row(self, row: RankedRow) -> ScoredRow:
        """Score the pairs of one row; a fault of the row is noted, one of the system is raised."""
        try:
            query, *candidates = (
                open_input(self._images, item.text, item.images, self._config.image_options())
                for item in (row.query, *row.candidates)
            )
            if self._judge.framing == "likelihood":
                # Answers are told in the words in which the model is asked for an embedding: without a request, a
                # model goes on as it likes.
                asked = strategy("hierarchical").suffix("query", bool(row.query.images))
                query["text"] = query.get("text", "").rstrip("\n") + asked
            found = self._judge.score(query, candidates)
        except ImageError as error:
            if is_of_the_system(error):
                raise
            return ScoredRow(fault=(error.file, error.reason))
        except ValueError as error:
            return ScoredRow(fault=("", f"refused by the reranker: {one_line(error)}"))
        if not np.isfinite(found.scores).all():
            return ScoredRow(fault=("", "the reranker returned NaN or infinity"))
        options = found.options.reshape(-1, 2).astype(np.float64)
        return ScoredRow(
            scores=tuple(map(float, found.scores)),
            answers=len(options),
            mass=float(options.sum()),
            first=int((options[:, 0] > options[:, 1]).sum()),
            num_tokens=found.num_tokens,
            num_tokens_in_full=found.num_tokens_in_full,
        )
