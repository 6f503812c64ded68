"""Running a job on a Ray cluster: its workers encode the parts, this process cuts the input and writes the reports.

A part travels as a plain description. Each worker reads its rows, encodes them and writes its files into the output
folder, which all hosts share; only the part's number and counts come back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from gen2embed_mteb.distributed.pool import RayPool
from gen2embed_mteb.distributed.worker import ShardWorker as ModelWorker
from gen2embed_mteb.distributed.worker import require_same_folder
from gen2embed_mteb.encode_command.run_record import Run
from gen2embed_mteb.encode_command.shard import EncodeJob, ShardWorker, encode_shard
from gen2embed_mteb.encode_command.sources import Part
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import new_token, temporary_of

MAX_DEATHS = 3
"""The number of workers that may die with one part."""
APPEARANCE_SECONDS = 60.0
"""Seconds after which a part that a worker has written must be seen here; file systems of networks can be late."""
TOUCH_SECONDS = 60.0


class PartDone(NamedTuple):
    """What a worker answers: the part's number, and how many inputs went through the model."""

    number: int
    num_encoded: int


@dataclass(frozen=True)
class PartSetup:
    """What all parts of a job have in common, and how a worker knows that it sees the driver's folder."""

    job: EncodeJob
    probe: str = ""
    token: str = ""

    def open(self, load: Callable[[], ModelWorker]) -> PartWorker:
        """Return what encodes the parts in a worker's process.

        Args:
            load: Returns the worker with its model.

        Raises:
            Gen2EmbedError: This host sees another output folder than the driver, or loads another model.
        """
        require_same_folder(self.job.folder().inside, self.probe, self.token)
        return PartWorker(load(), self.job)


class PartWorker:
    """Encodes parts with the model of a worker."""

    def __init__(self, worker: ModelWorker, job: EncodeJob) -> None:
        """Keep the arguments."""
        self._encoder, self._job = worker.encoder, job

    def run(self, part: Part) -> PartDone:
        """Encode a part and write its files, unless that was done before."""
        with ShardWorker(self._encoder, self._job) as worker:
            encode_shard(part, worker)
            return PartDone(part.number, worker.bulk.num_encoded)


def run_in_pool(pool: RayPool, job: EncodeJob) -> Run:
    """Encode all parts with the workers of a pool; see `driver.run_job`.

    Args:
        pool: The workers.
        job: The job; its folder must be ready (`PartsFolder.begin`).

    Raises:
        Gen2EmbedError: The input cannot be read, a host does not see the folder, or workers die with the same part.
    """
    from tqdm import tqdm

    started, size, total = time.monotonic(), job.options.rows_per_shard, job.source.num_rows
    count, folder, token = -(-total // size), job.folder(), new_token()
    probe = temporary_of(folder.inside / "probe", token)
    probe.write_text(token, encoding="utf-8")
    touched, num_encoded, checked = started, 0, set()

    def look() -> None:
        nonlocal touched
        lost = f", {pool.state.num_lost} lost" if pool.state.num_lost else ""
        bar.set_description_str(f"encode ({pool.state.num_ready} workers{lost})", refresh=False)
        if time.monotonic() - touched > TOUCH_SECONDS:
            probe.touch()  # a temporary file that is an hour old counts as left over
            touched = time.monotonic()

    try:
        with tqdm(total=total, unit="row", unit_scale=True, desc="encode", disable=not sys.stderr.isatty()) as bar:
            for done, answer in pool.run(PartSetup(job, probe.name, token), _parts(job), look, num_jobs=count):
                result: PartDone = answer
                _await(job, done.part.number)
                num_encoded += result.num_encoded
                checked.add(result.number)
                bar.update(done.part.num_rows)
    finally:
        probe.unlink(missing_ok=True)
    return Run(count, frozenset(checked), num_encoded, total, time.monotonic() - started)


def _parts(job: EncodeJob) -> Iterator[_PartInWork]:
    return (_PartInWork(part) for part in job.source.parts(job.options.rows_per_shard))


def _await(job: EncodeJob, number: int) -> None:
    started, folder = time.monotonic(), job.folder()
    while folder.find(number, checked=False) is None:
        if time.monotonic() - started > APPEARANCE_SECONDS:
            raise Gen2EmbedError(
                f"{folder.path}: a worker has written part {number}, which is not seen here after "
                f"{APPEARANCE_SECONDS:.0f} s; put the folder on a file system that all hosts share"
            )
        time.sleep(0.1)


class _PartInWork:
    """A job of the pool: a part, and how many workers died with it."""

    def __init__(self, part: Part) -> None:
        self.part, self._deaths = part, 0

    def payload(self) -> Part:
        return self.part

    def died(self) -> None:
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            first, last = self.part.first_row, self.part.first_row + self.part.num_rows - 1
            raise Gen2EmbedError(
                f"{self._deaths} workers died with rows {first:,} to {last:,} of the input; see Ray's logs for the "
                "reason (lack of memory, for instance). A smaller --rows_per_shard tells which row it is"
            )
