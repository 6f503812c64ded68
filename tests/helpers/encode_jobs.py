"""Jobs of `gen2embed encode` with the small encoder of `plain_encoder`, and what they leave."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.encode_command.driver import run_job
from gen2embed_mteb.encode_command.opening import open_source
from gen2embed_mteb.encode_command.options import EncodeOptions
from gen2embed_mteb.encode_command.report import Outcome, write_reports
from gen2embed_mteb.encode_command.shard import EncodeJob

CREATING = os.O_CREAT | os.O_WRONLY | os.O_RDWR


def job_of(data: Path, output: Path, fingerprint: str = "f", **options: Any) -> EncodeJob:
    """A job whose folder is ready."""
    given = EncodeOptions(**{"input": str(data), "output_dir": str(output), "batch_size": 5, **options})
    job = EncodeJob(given, open_source(given), fingerprint)
    job.folder().begin(overwrite=given.overwrite)
    return job


def encode(data: Path, output: Path, encoder: Any = None, **options: Any) -> Outcome:
    """Encode an input in this process, and write the reports."""
    job = job_of(data, output, **options)
    run = run_job(encoder or PlainEncoder(), job, Share())
    return write_reports(job, run.num_parts, {"name": "plain"}, run.checked)


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """A JSON lines file; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(count: int) -> list[dict[str, Any]]:
    """Rows of unequal lengths, some of them equal."""
    return [{"id": f"r{n}", "text": f"text {n % 37} " + "word " * (n % 7)} for n in range(count)]


def table(output: Path) -> list[dict[str, Any]]:
    """All rows of all Parquet parts, in order."""
    return [
        row for path in sorted(output.glob("part-*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


def errors(output: Path) -> list[dict[str, Any]]:
    """The rows that were set aside."""
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, str]:
    """The files below a folder by their digests, but locks, which are empty."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", ".gen2embed-files.lock")
    }


def forked(run: Callable[[], Any], folder: Path | None = None, stop_at: int = 0) -> tuple[int, int]:
    """Run something in a fork of this process.

    Args:
        run: What is run.
        folder: If given, its operations on files below this folder are counted.
        stop_at: The number of the operation, from 1, before which the process ends as if it was killed; 0: never.

    Returns:
        The exit status, and the number of operations.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status, counted = 1, 0

        def audit(event: str, args: tuple[Any, ...]) -> None:
            nonlocal counted
            if event == "open":
                wanted = isinstance(args[0], str | os.PathLike) and args[2] & CREATING
            else:
                wanted = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            if wanted and str(args[0]).startswith(str(folder)) and not str(args[0]).endswith("lock"):
                counted += 1
                if counted == stop_at:
                    os._exit(9)

        try:
            if folder is not None:
                import sys

                sys.addaudithook(audit)
            run()
            status = 0
        finally:
            os.write(writer, str(counted).encode())
            os._exit(status)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    told = os.read(reader, 100)
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(told or 0)
