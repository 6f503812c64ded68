"""Samples one subset: reads, encodes and mines its rows, and makes its record.

The texts and paths of all usable rows are kept in memory, and while negatives are chosen, the vectors too. The table is
read once to make the subset, and once more beforehand if an earlier run left a record, to compare the rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.types import Encoder, Fault, Item
from gen2embed_mteb.distributed.pool import RayPool
from gen2embed_mteb.evaluation.run import RowError, installed_versions, open_bulk_encoder
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from trainers.data.training_data import MmebSubset, TrainingData, TrainingSubset
from trainers.saha.approximate_search import EXACT, POINTS_PER_LIST, IvfSearch
from trainers.saha.block_jobs import KnownPools, search_in_blocks
from trainers.saha.clusters import mine_clusters
from trainers.saha.hard_negatives import hard_negatives
from trainers.saha.search_protocol import Search
from trainers.sampling.config import ModelRecord, SampleConfig
from trainers.sampling.files import (
    OFFICIAL_SUFFIX,
    RowsDigest,
    SampledClusters,
    SamplingError,
    read_sampling,
    write_official,
)

logger = logging.getLogger(__name__)

_WHERE_UNSAID = {"search": EXACT, "search_threshold": None, "exif_orientation": False}
"""What a record means that does not say it."""


class _Read(NamedTuple):
    """A subset's rows: usable ones, rejected ones, how many there are, how many were collapsed, and their digest."""

    rows: list[TrainRow]
    rejected: list[BadRow]
    num_rows: int
    num_collapsed: int
    digest: str


class SubsetRun:
    """One subset of a sampling run: compares it with an earlier run, and makes its clusters and its record."""

    def __init__(self, subset: TrainingSubset, data: TrainingData, model: ModelRecord, config: SampleConfig) -> None:
        """Store the arguments; nothing is read yet."""
        self.subset = subset
        self._data, self._model, self._config = data, model, config
        self._path = config.folder / f"{subset.name}.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the record of this subset if it is finished; None if it must be made.

        Raises:
            SamplingError: The subset was made with other settings, data or model, and must not be replaced.
        """
        if not self._path.exists():
            return None
        try:
            record = read_sampling(self._path).record
        except SamplingError:
            if not self._config.overwrite:
                raise
            return None
        digest = RowsDigest()
        for row in self.subset.rows():
            digest.add(row)
        now = {
            **_WHERE_UNSAID,
            "method": self._config.method,
            **self._config.decisive(self.subset.name),
            "data": digest.hexdigest(),
            "model": self._model.fingerprint,
        }
        then = {
            **_WHERE_UNSAID,
            "method": record["method"],
            **record["settings"],
            "data": record["data"]["digest"],
            "model": record["model"]["fingerprint"],
        }
        differing = [
            f"{name} was {then.get(name)!r}, now {value!r}" for name, value in now.items() if then.get(name) != value
        ]
        if not differing:
            # If there were errors, the subset is made again: an image may have been repaired since. All other vectors
            # are stored already.
            return None if record["counts"]["errors"] else record
        if not self._config.overwrite:
            raise SamplingError(
                f"{self._path}: made by another run ({'; '.join(differing)}); pass another --output_dir, or --overwrite"
            )
        logger.warning("%s: replaced, as it was made by another run (%s)", self._path, "; ".join(differing))
        return None

    def encode_share(self, encoder: Encoder) -> None:
        """Make this process's share of the vectors, and of the search if it is done in jobs."""
        read = self._read()
        bulk = self._encode(encoder, read.rows)
        if self._config.search_block:
            faults = _faults(bulk, read.rows)
            faults |= self._faults_of_negatives(row for row in read.rows if row.index not in faults)
            pairs = _numbered(bulk, [row for row in read.rows if row.index not in faults])
            if len(pairs.ids):
                self._open_search(pairs, *_vectors(bulk, pairs), None)

    def make(self, encoder: Encoder | None) -> tuple[dict[str, Any], SampledClusters, list[RowError]]:
        """Read, encode and mine the subset; return its record, its clusters and the rows that were set aside."""
        start = time.monotonic()
        read = self._read()
        faults: dict[int, Fault] = {}
        bulk = None
        if encoder is not None and self._config.method != "in-batch":
            bulk = self._encode(encoder, read.rows)
            faults = _faults(bulk, read.rows)
        faults |= self._faults_of_negatives(row for row in read.rows if row.index not in faults)
        rows = [row for row in read.rows if row.index not in faults]
        encoded = time.monotonic()
        clusters, num_candidates, searched = self._mine(bulk, rows, getattr(encoder, "pool", None))
        mined = time.monotonic()
        rejected = [RowError(self.subset.name, bad.index, bad.file, bad.reason) for bad in read.rejected]
        rejected += [
            RowError(self.subset.name, index, fault.file or self.subset.source, fault.reason)
            for index, fault in faults.items()
        ]
        rejected.sort(key=lambda error: error.row)
        seconds = {"encode": round(encoded - start, 2), "mine": round(mined - encoded, 2)}
        counts = {
            "rows": read.num_rows,
            "queries": len(rows),
            "candidates": num_candidates,
            "collapsed": read.num_collapsed,
            "errors": len(rejected),
            **_counts(clusters, self._config.method),
        }
        if any(row.more_positives for row in rows):
            counts["positives"] = sum(len(row.positives) for row in rows)
        if negatives := sum(len(row.negatives) for row in rows):
            counts["explicit_negatives"] = negatives
        return self._record(read, counts, seconds) | searched, clusters, rejected

    def _read(self) -> _Read:
        digest = RowsDigest()
        rows: list[TrainRow] = []
        rejected: list[BadRow] = []
        for row in self.subset.rows():
            digest.add(row)
            if isinstance(row, BadRow):
                rejected.append(row)
            else:
                rows.append(row)
        kept = rows
        if self._config.method == "saha" and self._config.variant == "official":
            # As in the official code: of rows with the same query, the last is kept, at the place of the first.
            kept = list({row.query: row for row in rows}.values())
        return _Read(kept, rejected, len(rows) + len(rejected), len(rows) - len(kept), digest.hexdigest())

    def _faults_of_negatives(self, rows: Iterable[TrainRow]) -> dict[int, Fault]:
        """Return the faults of rows with an explicit negative whose image cannot be opened; it is never encoded here.

        Training would find out only when the row's turn comes.
        """
        known: dict[str, Fault | None] = {}
        faults: dict[int, Fault] = {}
        for row in rows:
            for path in (path for negative in row.negatives for path in negative.images):
                if path not in known:
                    try:
                        self._data.images.open(path)
                        known[path] = None
                    except ImageError as error:
                        known[path] = Fault(path, str(error))
                if fault := known[path]:
                    faults[row.index] = fault
        return faults

    def _record(self, read: _Read, counts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        config = self._config
        return {
            "subset": self.subset.name,
            "method": config.method,
            "settings": config.decisive(self.subset.name),
            "data": {
                "data_dir": config.data_dir,
                "image_dir": config.image_dir,
                "source": self.subset.source,
                "split": self._data.split,
                "columns": list(config.columns),
                "image_columns": list(config.image_columns),
                "limit": config.limit,
                "row_limits": config.row_limits(),
                **({} if isinstance(self.subset, MmebSubset) else {"pairs_only": config.pairs_only}),
                "num_rows": read.num_rows,
                "digest": read.digest,
            },
            "model": vars(self._model),
            "counts": counts,
            "versions": installed_versions(),
            "seconds": seconds,
        }

    def _encode(self, encoder: Encoder, rows: list[TrainRow]) -> BulkEncoder:
        config, name = self._config, self.subset.name
        folder = Path(config.embedding_dir).expanduser() if config.embedding_dir else config.folder / "embeddings"
        bulk = open_bulk_encoder(encoder, config, self._data.images, folder=folder, fingerprint=self._model.fingerprint)
        bulk = bulk.for_dataset(name)
        bulk.add("query", [row.query for row in rows], f"{name} queries")
        bulk.add("document", [positive for row in rows for positive in row.positives], f"{name} candidates")
        return bulk

    def _mine(
        self, bulk: BulkEncoder | None, rows: list[TrainRow], pool: RayPool | None
    ) -> tuple[SampledClusters, int, dict[str, Any]]:
        """Choose negatives; return them in row ids, the number of distinct candidates, and how they were searched."""
        config, pairs = self._config, _numbered(bulk, rows)
        ids, positives, numbers, more = pairs.ids, pairs.positives, pairs.candidates, pairs.more_positives
        first_phase = np.ones(len(rows), dtype=np.int64)
        if bulk is None or not rows:
            nobody = np.zeros((len(rows), 0), dtype=np.int64)
            return SampledClusters(ids, nobody, first_phase, nobody.astype(np.float32)), len(numbers), {}
        queries, candidates = _vectors(bulk, pairs)
        search, facts = self._open_search(pairs, queries, candidates, pool)
        if config.method == "saha":
            mined = mine_clusters(
                queries,
                candidates,
                positives,
                num_hard_negatives=config.num_hard_negatives,
                pool_multiplier=config.pool_multiplier,
                variant=config.variant,
                labelled=config.decisive(self.subset.name)["labelled"],
                more_positives=more,
                backend=config.search_backend,
                search=search,
            )
            members = _as_ids(mined.members, ids)
            return SampledClusters(ids[mined.anchors], members, mined.phase, mined.similarities), len(numbers), facts
        beta = config.beta if config.method == "hn-beta" else None
        k, backend = config.num_hard_negatives, config.search_backend
        of_content = pairs.by_content
        negatives = [
            [of_content[content] for content in map(self._content, row.negatives) if content in of_content]
            for row in rows
        ]
        found = hard_negatives(
            queries,
            candidates,
            positives,
            k,
            beta,
            more_positives=more,
            known_negatives=negatives,
            backend=backend,
            search=search,
        )
        # A candidate is represented by the first row that has it among its positives, and its place there.
        owners = np.zeros((len(numbers), 2), dtype=np.int64)
        for row, of_row in zip(reversed(rows), reversed(pairs.known), strict=True):
            for place, number in reversed(list(enumerate(of_row))):
                owners[number] = row.index, place
        members = _as_ids(found.candidates, owners[:, 0])
        places = None if more is None else _as_ids(found.candidates, owners[:, 1])
        return SampledClusters(ids, members, first_phase, found.similarities, places), len(numbers), facts

    def _content(self, item: Item) -> Hashable:
        """Return the content of an explicit negative, as `BulkEncoder.content` does of an item that was encoded."""
        return item.text, tuple(self._data.images.facts(path).digest for path in item.images)

    def _open_search(
        self,
        pairs: _Pairs,
        queries: npt.NDArray[np.float32],
        candidates: npt.NDArray[np.float32],
        pool: RayPool | None,
    ) -> tuple[Search | None, dict[str, Any]]:
        """Return the search that is asked for, and what the record says of it; None for a plain exact one."""
        config = self._config
        if config.search_block:
            wanted = config.num_hard_negatives * (config.pool_multiplier if config.method == "saha" else 1)
            official = config.method == "saha" and config.variant == "official"
            # More for the query's own positives; whatever else is needed is searched here.
            kept = 2 * wanted if official else wanted + max(map(len, pairs.known))
            given = queries, candidates
            options: dict[str, Any] = {"rows": config.search_block, "backend": config.search_backend}
            folder = config.folder / "search"
            share = Share.from_environment()
            return KnownPools(*given, *search_in_blocks(*given, kept, folder, share=share, pool=pool, **options)), {}
        if config.ivf is None:
            return None, {}
        if len(candidates) < max(config.search_threshold, POINTS_PER_LIST * config.ivf.nlist):
            return None, {"search": {"kind": "exact"}}
        search = IvfSearch(candidates, config.ivf)
        nearest = config.num_hard_negatives * (config.pool_multiplier if config.method == "saha" else 1)
        recall = search.recall(queries, nearest)
        logger.info("%s: the search finds %.4f of the %d nearest", self.subset.name, recall.share, recall.k)
        facts = {"kind": "ivf", **vars(config.ivf), "recall": round(recall.share, 6)}
        return search, {"search": facts | {"recall_at": recall.k, "recall_queries": recall.num_queries}}

    def write_official(self) -> None:
        """Write the official code's form of a finished subset."""
        if not isinstance(self.subset, MmebSubset):
            raise TypeError(f"{self.subset.source}: not in MMEB-train's form")
        sampling = read_sampling(self._path)
        path = self._path.with_name(self.subset.name + OFFICIAL_SUFFIX)
        write_official(path, sampling.clusters, self.subset.columns(), self._config.method)


class _Pairs(NamedTuple):
    """Rows as numbers.

    Attributes:
        ids: The rows' ids.
        queries: Their queries.
        candidates: The distinct candidates.
        known: The numbers of each row's positives among the candidates.
        by_content: The number of a candidate, by its content.
    """

    ids: npt.NDArray[np.int64]
    queries: list[Item]
    candidates: list[Item]
    known: list[list[int]]
    by_content: dict[Hashable, int]

    @property
    def positives(self) -> npt.NDArray[np.int64]:
        """(n,) int64, the first positive of each row."""
        return np.array([first for first, *_ in self.known], dtype=np.int64)

    @property
    def more_positives(self) -> list[list[int]] | None:
        """The further positives of each row; None if no row has any."""
        more = [others for _, *others in self.known]
        return more if any(more) else None


def _numbered(bulk: BulkEncoder | None, rows: list[TrainRow]) -> _Pairs:
    numbers: dict[Item, int] = {}
    firsts: dict[Hashable, Item] = {}
    # Copies of one picture under several names are one candidate; otherwise, a copy of a query's positive could become
    # its negative.
    own = [[firsts.setdefault(bulk.content(item) if bulk else item, item) for item in row.positives] for row in rows]
    known = [[numbers.setdefault(item, len(numbers)) for item in kept] for kept in own]
    ids = np.array([row.index for row in rows], dtype=np.int64)
    by_content = {content: numbers[item] for content, item in firsts.items()}
    return _Pairs(ids, [row.query for row in rows], list(numbers), known, by_content)


def _vectors(bulk: BulkEncoder, pairs: _Pairs) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    return bulk.vectors("query", pairs.queries), bulk.vectors("document", pairs.candidates)


def _faults(bulk: BulkEncoder, rows: list[TrainRow]) -> dict[int, Fault]:
    """Return the rows whose query has no vector, or one of whose positives has none, by id."""
    faults: dict[int, Fault] = {}
    for row in rows:
        found = (bulk.fault("document", positive) for positive in row.positives)
        if fault := bulk.fault("query", row.query) or next(filter(None, found), None):
            faults[row.index] = fault
    return faults


def _as_ids(members: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where(members >= 0, ids[members], -1)


def _counts(clusters: SampledClusters, method: str) -> dict[str, int]:
    real = clusters.members >= 0
    if method == "saha":
        rows = np.concatenate([clusters.anchors, clusters.members[real]])
        reused = int((np.unique(rows, return_counts=True)[1] > 1).sum())
    else:
        reused = 0  # in the baselines, queries are only anchors
    return {
        "clusters": len(clusters.anchors),
        "phase_1": int((clusters.phase == 1).sum()),
        "phase_2": int((clusters.phase == 2).sum()),
        "short": int((real.sum(axis=1) < clusters.members.shape[1]).sum()),
        "reused": reused,
    }
