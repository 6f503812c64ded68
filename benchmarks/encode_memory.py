"""Measures the memory of `gen2embed encode` above the model, while it encodes a million short texts.

    python benchmarks/encode_memory.py --output benchmarks/results/encode_memory.json

The encoder is a stand-in with the interface of a model, so that the time goes into reading, sorting and writing, and
nothing but `encode` itself takes memory: it returns unit vectors of 1,536 numbers that depend on the text alone. Each
number of rows runs in a process of its own, which states the most memory that it ever held; the memory that it held
before the run, with all libraries loaded, is subtracted. The last run searches the index that the largest one wrote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.names import Side
from gen2embed_mteb.storage.developer_files import write_json

DIMENSIONS = 1536
WANTED_GIB = 1.0


class StandIn:
    """An encoder in stages, as `PrefixEncoder` is, whose vectors are cheap."""

    batch_tokens = 1024

    def __init__(self) -> None:
        """Draw the rows that vectors are made of."""
        self._rows = np.random.default_rng(0).standard_normal((256, DIMENSIONS)).astype(np.float32)

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Any]) -> list[int]:
        """Return one token per word."""
        return [1 + text.count(" ") for text in texts]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> list[int]:
        """Return a number per text."""
        return [zlib.crc32(entry["text"].encode()) for entry in inputs]

    def encode_prepared(self, side: Side, batch: list[int]) -> npt.NDArray[np.float32]:
        """Return (n, d) unit rows."""
        numbers = np.array(batch, np.int64)
        rows = self._rows[numbers % 256] + self._rows[numbers // 256 % 256] * (numbers % 97 / 97)[:, None]
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--precision", default="float16")
    parser.add_argument("--work_dir", type=Path, help="where the index is written (default: a temporary folder)")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part[0]](Path(arguments.part[1]), arguments.precision)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        record = measure(Path(folder), arguments)
    header = ["rows", "above the model, MiB", "seconds", "rows/s", "index, MB"]
    lines = [
        [f"{run['rows']:,}", f"{run['above_mib']:.0f}", f"{run['seconds']:.0f}", f"{run['rows_per_second']:,.0f}",
         f"{run['index_mb']:,.0f}"]
        for run in record["encode"]
    ]  # fmt: skip
    print(as_text([header, *lines]))
    found = record["search"]
    print(f"search over {found['rows']:,} rows: {found['above_mib']:.0f} MiB, {found['seconds']:.1f} s")
    if arguments.output:
        write_json(arguments.output, record)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Encode each number of rows in a process of its own, then search the last index."""
    runs = []
    for count in arguments.rows:
        place = folder / str(count)
        place.mkdir()
        with (place / "texts.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                words = " ".join(f"w{(number * 7919 + place_) % 5003}" for place_ in range(3 + number % 12))
                file.write(json.dumps({"id": f"row-{number}", "text": words}) + "\n")
        runs.append(in_process("encode", place, arguments.precision))
    searched = in_process("search", folder / str(arguments.rows[-1]), arguments.precision)
    return {
        "command": "python " + " ".join(sys.argv),
        "encoder": f"a stand-in with the interface of a model; {DIMENSIONS} numbers per vector",
        "precision": arguments.precision,
        "versions": installed_versions(),
        "wanted_gib": WANTED_GIB,
        "encode": runs,
        "search": searched,
    }


def in_process(part: str, place: Path, precision: str) -> dict[str, Any]:
    """Run a part of this file in a process of its own, and return what it prints."""
    command = [sys.executable, __file__, "--precision", precision, "--part", part, str(place)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603
    return dict(json.loads(done.stdout))


def encode(place: Path, precision: str) -> dict[str, Any]:
    """Encode the texts of a folder as the command does, and return memory and time."""
    import pyarrow.parquet  # noqa: F401  # what every command has loaded counts as the model's

    import gen2embed_mteb.embedder.passes.prefix_cache  # noqa: F401
    from gen2embed_mteb.bulk.processes import Share
    from gen2embed_mteb.encode_command.driver import run_job
    from gen2embed_mteb.encode_command.opening import open_source
    from gen2embed_mteb.encode_command.options import EncodeOptions
    from gen2embed_mteb.encode_command.report import write_reports
    from gen2embed_mteb.encode_command.shard import EncodeJob

    encoder, data = StandIn(), place / "texts.jsonl"
    options = EncodeOptions(input=str(data), output_dir=str(place / "index"), precision=precision)
    job = EncodeJob(options, open_source(options), "stand-in")
    job.folder().begin(overwrite=False)
    before, started = resident(), time.monotonic()
    run = run_job(encoder, job, Share())
    outcome = write_reports(job, run.num_parts, {"name": "stand-in"}, run.checked)
    seconds = time.monotonic() - started
    return {
        "rows": outcome.num_rows,
        "above_mib": round((peak() - before) / 2**20, 1),
        "loaded_mib": round(before / 2**20, 1),
        "seconds": round(seconds, 1),
        "rows_per_second": round(outcome.num_rows / seconds, 1),
        "index_mb": round(outcome.num_bytes / 1e6, 1),
    }


def search(place: Path, precision: str) -> dict[str, Any]:
    """Search the index of a folder, and return memory and time."""
    import pyarrow.parquet  # noqa: F401

    from gen2embed_mteb.search_command.index import Index

    query = StandIn().encode_prepared("query", [1])[0]
    before, started = resident(), time.monotonic()
    index = Index(place / "index")
    index.search(query, 10)
    return {
        "rows": index.num_vectors,
        "above_mib": round((peak() - before) / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


PARTS = {"encode": encode, "search": search}


def resident() -> int:
    """Return the memory that this process holds now, in bytes."""
    return _status("VmRSS")


def peak() -> int:
    """Return the most memory that this process ever held, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    main()
