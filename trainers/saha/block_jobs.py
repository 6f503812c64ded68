"""Exact search in jobs of a block of queries and a block of candidates, for more than one machine.

1. Queries and candidates are written once into a folder that all processes share, named by their content.
2. A job finds, for one block of queries, the best P candidates of one block, with canonical scores (`search.py`). It
   depends on nothing else, and its result is a file named by the digest of its work: a job that was made before is not
   made again.
3. Jobs are done by this process and its peers of `torchrun`, or by the workers of a Ray cluster.
4. For each query the results of all blocks are merged: the best P of all, ties by the smaller index. Canonical scores
   of a pair do not depend on the block that it is in, so this is the result of one search, to the bit.

`KnownPools` answers as the search would, from these results; what it does not know it searches.

Cost: that of the search, and per job reading its candidates. The results take 16 bytes per query, candidate block and
place on disk, 12 merged in memory; Algorithm 1 alone would search fewer queries, as clusters use them up.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.distributed.pool import CountedJob, RayPool
from gen2embed_mteb.distributed.shared_folder import probe_in, require_same_folder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import (
    ForeignFileError,
    remove_stale,
    set_aside,
    write_atomic,
)
from gen2embed_mteb.storage.owned_folder import MADE_BY
from trainers.saha.scores import Floats, Integers, Vectors, check_unit_rows, error_bound, sliced_terms
from trainers.saha.search import Backend, ExactSearch

logger = logging.getLogger(__name__)

FORMAT = 1
_STEM = 32
_ROWS_HASHED = 65_536


@dataclass(frozen=True)
class BlockJob:
    """One job: rows of queries and of candidates (start included, stop excluded), and how many candidates are kept."""

    key: str
    queries: tuple[int, int]
    candidates: tuple[int, int]
    kept: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of its result: queries, and the candidates that are kept of this block."""
        return self.queries[1] - self.queries[0], min(self.kept, self.candidates[1] - self.candidates[0])


@dataclass(frozen=True)
class BlockSetup:
    """What all jobs have in common: the shared folder, the two files in it, and what searches."""

    folder: str
    queries: str
    candidates: str
    backend: Backend
    probe: str = ""
    token: str = ""

    def open(self, _load: Callable[[], Any]) -> BlockWorker:
        """Return what does the jobs in a worker's process; no model is loaded for it.

        Raises:
            Gen2EmbedError: This host sees another folder than the driver.
        """
        require_same_folder(Path(self.folder), self.probe, self.token)
        return BlockWorker(self)


class BlockWorker:
    """Does jobs; it keeps the search over the last block of candidates."""

    def __init__(self, setup: BlockSetup) -> None:
        """Map the two files."""
        folder = Path(setup.folder)
        self._folder, self._backend = folder, setup.backend
        self._queries, self._candidates = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (setup.queries, setup.candidates)
        )
        self._known: tuple[tuple[int, int], ExactSearch] | None = None

    def run(self, job: BlockJob) -> str:
        """Do a job, write its result, and return its key."""
        if read_result(self._folder, job) is None:
            if self._known is None or self._known[0] != job.candidates:
                block = np.array(self._candidates[slice(*job.candidates)])
                self._known = job.candidates, ExactSearch(block, backend=self._backend)
            columns, scores = self._known[1].top_k(np.array(self._queries[slice(*job.queries)]), job.shape[1])
            _write_result(self._folder, job, columns + job.candidates[0], scores)
        return job.key


def search_in_blocks(
    queries: npt.NDArray[np.float32],
    candidates: npt.NDArray[np.float32],
    kept: int,
    folder: Path,
    *,
    rows: int,
    backend: Backend = "auto",
    share: Share | None = None,
    pool: RayPool | None = None,
) -> tuple[Integers, Floats]:
    """Find the candidates most similar to each query in jobs; the result is that of `ExactSearch.top_k`.

    Args:
        queries: (n, d) unit rows.
        candidates: (M, d) unit rows.
        kept: How many candidates per query.
        folder: A folder that all processes share; it is made if missing, and its results are found again.
        rows: The rows of a block, of queries and of candidates.
        backend: See `ExactSearch`.
        share: The jobs that belong to this process.
        pool: The workers of a Ray cluster that do all jobs instead.

    Returns:
        Candidates (n, min(kept, M)), the best first, ties by the smaller index, and their canonical scores.

    Raises:
        Gen2EmbedError: The vectors are not unit rows, or workers die with the same job.
    """
    for name, vectors in (("query_embeddings", queries), ("candidate_embeddings", candidates)):
        check_unit_rows(vectors, name)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    names = [_keep(folder, vectors) for vectors in (queries, candidates)]
    setup = BlockSetup(str(folder.absolute()), names[0], names[1], backend)
    jobs = list(_jobs(names, len(queries), len(candidates), min(kept, len(candidates)), rows))
    missing = {job.key: number for number, job in enumerate(jobs) if read_result(folder, job) is None}
    by_key = {job.key: job for job in jobs}
    if missing and pool is not None:
        _run_in_pool(pool, setup, folder, [by_key[key] for key in missing])
    elif missing:
        share, worker = share or Share(), BlockWorker(setup)
        for key in (key for key, number in missing.items() if share.owns(number)):
            worker.run(by_key[key])
        others = {key: number for key, number in missing.items() if not share.owns(number)}
        for key, found in Peers(share).await_others(others, lambda key: read_result(folder, by_key[key])):
            if found is None:
                worker.run(by_key[key])
    return _merged(folder, jobs, len(queries), min(kept, len(candidates)))


class KnownPools:
    """Answers as an exact search does, for queries whose candidates were found before; see `ExactSearch`.

    Args:
        queries: (n, d) unit rows.
        candidates: (M, d) unit rows.
        columns: (n, P) The best candidates of each query, in order.
        scores: (n, P) Their canonical scores.
    """

    def __init__(self, queries: Vectors, candidates: Vectors, columns: Integers, scores: Floats) -> None:
        """Remember which query has which vector; equal vectors have equal answers."""
        self.candidates = check_unit_rows(candidates, "candidate_embeddings")
        self.devices = [self.candidates.device]
        self.error = error_bound(sliced_terms(self.candidates.shape[1]))
        self._queries = check_unit_rows(queries, "query_embeddings")
        self._columns, self._scores = columns, scores
        hashes = _hashes(self._queries)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def top_k(self, queries: Vectors, k: int) -> tuple[Integers, Floats]:
        """Find the k candidates most similar to each query; see `ExactSearch.top_k`."""
        places = self._places(queries)
        if min(k, len(self.candidates)) > self._columns.shape[1] or places is None:
            return self._exact.top_k(queries, k)
        return self._columns[places, :k], self._scores[places, :k]

    def pools(self, queries: Vectors, k: int, exclude: Integers | None = None) -> tuple[list[Integers], list[Floats]]:
        """Find the k candidates most similar to each query; see `ExactSearch.pools`."""
        places = self._places(queries)
        needed = min(k + (exclude is not None), len(self.candidates))
        if needed > self._columns.shape[1] or places is None:
            return self._exact.pools(queries, k, exclude)
        columns: list[Integers] = []
        scores: list[Floats] = []
        for row, place in enumerate(places.tolist()):
            kept = np.ones(needed, bool) if exclude is None else self._columns[place, :needed] != exclude[row]
            columns.append(self._columns[place, :needed][kept][:k])
            scores.append(self._scores[place, :needed][kept][:k])
        return columns, scores

    @cached_property
    def _exact(self) -> ExactSearch:
        return ExactSearch(self.candidates)

    def _places(self, queries: Vectors) -> Integers | None:
        """Return the number of each query; None if one of them is not known."""
        asked = check_unit_rows(queries, "queries")
        at = np.searchsorted(self._sorted, _hashes(asked))
        places = self._order[np.minimum(at, len(self._order) - 1)]
        known = self._queries[places].to(asked.dtype) == asked
        return places if bool(known.all()) else None


def read_result(folder: Path, job: BlockJob) -> tuple[Integers, Floats] | None:
    """Return the result of a job; None if it is missing or damaged.

    Args:
        folder: The folder of the results.
        job: The job.
    """
    path = _path(folder, job)
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if head != _head(job, data):
        logger.warning("%s: damaged, or of other work; it is made again", path)
        return None
    both = np.load(io.BytesIO(data), allow_pickle=False)
    return both[0].astype(np.int64), both[1].astype(np.float32)


def _write_result(folder: Path, job: BlockJob, columns: Integers, scores: Floats) -> None:
    buffer = io.BytesIO()
    # float64 holds row numbers up to 2^53 and every float32 without loss.
    np.save(buffer, np.stack([columns.astype(np.float64), scores.astype(np.float64)]), allow_pickle=False)
    data, path = buffer.getvalue(), _path(folder, job)
    try:
        write_atomic(path, _head(job, data) + b"\n" + data)
    except ForeignFileError:  # damaged, or not ours: the name is the digest of the work, which has these bytes alone
        set_aside(path)
        write_atomic(path, _head(job, data) + b"\n" + data)


def _path(folder: Path, job: BlockJob) -> Path:
    return folder / f"{job.key[:_STEM]}.block"


def _head(job: BlockJob, data: bytes) -> bytes:
    facts = {"made_by": MADE_BY, "format": FORMAT, "key": job.key, "sha256": hashlib.sha256(data).hexdigest()}
    return json.dumps(facts).encode()


def _keep(folder: Path, vectors: npt.NDArray[np.float32]) -> str:
    """Write vectors, unless they are there, and return the name of their file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)
    data = buffer.getvalue()
    name = f"{hashlib.sha256(data).hexdigest()[:_STEM]}.npy"
    write_atomic(folder / name, data)
    return name


def _jobs(names: list[str], queries: int, candidates: int, kept: int, rows: int) -> Iterator[BlockJob]:
    for left in range(0, candidates, rows):
        for top in range(0, queries, rows):
            bounds = (top, min(top + rows, queries)), (left, min(left + rows, candidates))
            key = hashlib.sha256(json.dumps([FORMAT, *names, *bounds, kept]).encode()).hexdigest()
            yield BlockJob(key, *bounds, kept)


def _merged(folder: Path, jobs: list[BlockJob], queries: int, kept: int) -> tuple[Integers, Floats]:
    columns, scores = np.empty((queries, kept), np.int64), np.empty((queries, kept), np.float32)
    by_queries: dict[tuple[int, int], list[BlockJob]] = {}
    for job in jobs:
        by_queries.setdefault(job.queries, []).append(job)
    for (start, stop), parts in by_queries.items():
        found = [read_result(folder, job) for job in parts]
        present = [one for one in found if one is not None]
        if len(present) < len(found):
            raise Gen2EmbedError(f"{folder}: results of the search are gone; run the same command again")
        both = [np.concatenate(side, axis=1) for side in zip(*present, strict=True)]
        order = np.lexsort((both[0], -both[1]), axis=1)[:, :kept]
        columns[start:stop], scores[start:stop] = (np.take_along_axis(side, order, axis=1) for side in both)
    return columns, scores


def _hashes(vectors: Any) -> npt.NDArray[np.uint64]:
    parts = []
    for start in range(0, len(vectors), _ROWS_HASHED):
        rows = vectors[start : start + _ROWS_HASHED].float().cpu().numpy()
        parts += [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]
    return np.array(parts, np.uint64)


def _counted(job: BlockJob) -> CountedJob[BlockJob]:
    first, end = job.candidates
    return CountedJob(
        job,
        f"while they searched candidates {first:,} to {end:,}; is there memory for such a block? Pass a smaller "
        "--search_block",
    )


def _run_in_pool(pool: RayPool, setup: BlockSetup, folder: Path, jobs: list[BlockJob]) -> None:
    from tqdm import tqdm

    with probe_in(folder) as probe, tqdm(total=len(jobs), desc="searching", unit="block", disable=None) as bar:
        prepared = replace(setup, probe=probe.name, token=probe.token)
        for _ in pool.run(prepared, map(_counted, jobs), probe.keep, num_jobs=len(jobs)):
            bar.update()
