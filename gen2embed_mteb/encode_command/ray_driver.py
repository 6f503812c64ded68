"""Running a job on a Ray cluster: its workers encode the parts, this process cuts the input and writes the reports.

A part travels as a plain description. Each worker reads its rows, encodes them and writes its files into the output
folder, which all hosts share; only the part's number and counts come back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from gen2embed_mteb.distributed.pool import CountedJob, RayPool
from gen2embed_mteb.distributed.shared_folder import probe_in, require_same_folder, wait_until_seen
from gen2embed_mteb.distributed.worker import ShardWorker as ModelWorker
from gen2embed_mteb.encode_command.run_record import Run
from gen2embed_mteb.encode_command.shard import EncodeJob, ShardWorker, encode_shard
from gen2embed_mteb.encode_command.sources import Part


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
    count, folder, num_encoded, checked = -(-total // size), job.folder(), 0, set()
    with (
        probe_in(folder.inside) as probe,
        tqdm(total=total, unit="row", unit_scale=True, desc="encode", disable=not sys.stderr.isatty()) as bar,
    ):

        def look() -> None:
            bar.set_description_str(pool.state.after("encode"), refresh=False)
            probe.keep()

        setup = PartSetup(job, probe.name, probe.token)
        for done, answer in pool.run(setup, map(_counted, job.source.parts(size)), look, num_jobs=count):
            result: PartDone = answer
            number = done.work.number
            wait_until_seen(partial(folder.find, number, checked=False), folder.path, f"part {number}")
            num_encoded += result.num_encoded
            checked.add(result.number)
            bar.update(done.work.num_rows)
    return Run(count, frozenset(checked), num_encoded, total, time.monotonic() - started)


def _counted(part: Part) -> CountedJob[Part]:
    first, last = part.first_row, part.first_row + part.num_rows - 1
    return CountedJob(
        part,
        f"with rows {first:,} to {last:,} of the input; see Ray's logs for the reason (lack of memory, for instance). "
        "A smaller --rows_per_shard tells which row it is",
    )
