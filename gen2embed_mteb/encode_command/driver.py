"""Running a job: this process, or its share of the parts where `torchrun` started several, then the reports.

Process r of n encodes every n-th part, then waits until the markers of the others' parts appear in the output folder;
the parts of a process that died are encoded by the others (`bulk.processes`). The processes need nothing but a common
folder, so they may run on several hosts.

Another driver needs three things of this package: the parts (`job.source.parts`), `encode_shard` for each of them in
any order, and `write_reports` when all are made.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.distributed.encoder import RayEncoder
from gen2embed_mteb.encode_command.options import STREAM
from gen2embed_mteb.encode_command.parts_folder import PartRecord
from gen2embed_mteb.encode_command.run_record import Run
from gen2embed_mteb.encode_command.shard import (
    EncodeJob,
    PartInputs,
    ShardWorker,
    content_of,
    encode_part,
    encode_shard,
    read_part,
)
from gen2embed_mteb.encode_command.sources import Part

PARTS_OF_PATIENCE = 3
"""A process is taken for dead if it finishes nothing for as long as this many of the longest part took here."""


def run_job(encoder: Encoder, job: EncodeJob, share: Share | None = None) -> Run:
    """Encode this process's share of the parts, and wait for the others; with a `RayEncoder`, its workers encode all.

    Args:
        encoder: The model.
        job: The job; its folder must be ready (`PartsFolder.begin`).
        share: The share of this process; None reads it from the environment.

    Raises:
        Gen2EmbedError: The input cannot be read.
    """
    from tqdm import tqdm

    if isinstance(encoder, RayEncoder):
        from gen2embed_mteb.encode_command.ray_driver import run_in_pool

        return run_in_pool(encoder.pool, job)
    share = share or Share.from_environment()
    started, size, total = time.monotonic(), job.options.rows_per_shard, job.source.num_rows
    count, checked, rows = -(-total // size), set(), 0
    silent = share.rank > 0 or not sys.stderr.isatty()
    with (
        ShardWorker(encoder, job) as worker,
        tqdm(total=total, unit="row", unit_scale=True, desc="encode", disable=silent) as bar,
    ):
        before = worker.folder.numbers()
        others: dict[str, int] = {}
        longest, began = 0.0, time.monotonic()
        own = _own_parts(job.source.parts(size), share, others)
        with closing(_read_ahead(own, worker, count)) as read:
            for inputs, label in read:
                encode_part(inputs, worker, label)
                longest, began = max(longest, time.monotonic() - began), time.monotonic()
                checked.add(inputs.part.number)
                rows += inputs.part.num_rows
                bar.update(inputs.part.num_rows)
        # A process shows a sign of life once per part, which may take longer than the usual patience.
        patient = replace(share, patience=max(share.patience, PARTS_OF_PATIENCE * longest))
        waiting = _Waiting(job, worker, before)
        for key, found in Peers(patient).await_others(others, lambda key: waiting.find(others[key])):
            if found is None:
                part = waiting.part(others[key])
                encode_shard(part, worker, _label(part, count))
                checked.add(part.number)
                rows += part.num_rows
            bar.update(part.num_rows if found is None else found.num_rows)
        num_encoded = worker.bulk.num_encoded
    return Run(count, frozenset(checked), num_encoded, rows, time.monotonic() - started)


def _own_parts(parts: Iterator[Part], share: Share, others: dict[str, int]) -> Iterator[Part]:
    """Yield the parts of this process, and note the numbers of the others'."""
    for part in parts:
        if share.owns(part.number):
            yield part
        else:
            others[str(part.number)] = part.number


def _read_ahead(parts: Iterator[Part], worker: ShardWorker, count: int) -> Generator[tuple[PartInputs, str]]:
    """Yield parts that were read, with their labels: a thread reads the next one while a part is encoded.

    A stream of the hub is read by this thread: a stalled connection can be interrupted here alone.
    """
    if worker.job.source.kind == STREAM:
        for part in parts:
            label = _label(part, count)
            yield read_part(part, worker, label), label
        return
    ahead: deque[tuple[Future[PartInputs], str]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        try:
            for part in parts:
                label = _label(part, count)
                ahead.append((reader.submit(read_part, part, worker, label), label))
                if len(ahead) > 1:
                    future, label = ahead.popleft()
                    yield future.result(), label
            for future, label in ahead:
                yield future.result(), label
        finally:
            worker.images.stop_reading.set()  # of slow images, too
            reader.shutdown(cancel_futures=True)
            worker.images.stop_reading.clear()


def _label(part: Part, count: int) -> str:
    """Return the name of a part in the progress bar."""
    return f"part {part.number + 1} of {count}"


class _Waiting:
    """Finds the parts that other processes make.

    A marker that was there when this process started may be of an input that changed since; the part's content is then
    read and compared.
    """

    def __init__(self, job: EncodeJob, worker: ShardWorker, before: set[int]) -> None:
        self._job, self._worker, self._before = job, worker, before
        self._contents: dict[int, str] = {}

    def find(self, number: int) -> PartRecord | None:
        """Return the record of a part that is made; None if it is not."""
        folder = self._worker.folder
        found = folder.find(number, checked=False)
        if found is None or number not in self._before:
            return found
        if number not in self._contents:
            self._contents[number] = content_of(self.part(number), self._worker)
        return found if found.content == self._contents[number] else None

    def part(self, number: int) -> Part:
        """Return a part by its number."""
        return next(nth_parts(self._job, {number}))


def nth_parts(job: EncodeJob, numbers: set[int]) -> Iterator[Part]:
    """Yield some parts of an input, in order.

    Args:
        job: The job.
        numbers: The numbers of the parts.
    """
    left = len(numbers)
    for part in job.source.parts(job.options.rows_per_shard):
        if not left:
            return
        if part.number in numbers:
            left -= 1
            yield part
