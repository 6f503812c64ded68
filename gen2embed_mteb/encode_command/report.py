"""What stands beside the vectors: `manifest.json`, and `errors.jsonl` with the rows that were set aside.

The manifest is written last; a folder without it is unfinished. It says what the vectors are made of and by, holds the
digest of every file, and names no time, so that a run that was killed and started again ends in the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gen2embed_mteb.encode_command.options import InputOptions
from gen2embed_mteb.encode_command.parts_folder import ERRORS, FORMAT, MANIFEST, PartRecord, PartsFolder
from gen2embed_mteb.encode_command.shard import EncodeJob
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.storage.owned_folder import MADE_BY
from gen2embed_mteb.version import __version__

MEANING = {
    "float32": "the vector",
    "float16": "the vector, rounded",
    "int8": "the vector is stored x scale, up to rounding",
}


@dataclass(frozen=True)
class Outcome:
    """What a finished folder holds.

    Attributes:
        manifest: The content of `manifest.json`.
        num_bytes: The size of the vectors' files.
        max_error_rate: The largest accepted share of rejected rows.
    """

    manifest: dict[str, Any]
    num_bytes: int
    max_error_rate: float

    @property
    def num_errors(self) -> int:
        """The number of rows that were set aside."""
        return int(self.manifest["counts"]["errors"])

    @property
    def num_rows(self) -> int:
        """The number of rows of the input."""
        return int(self.manifest["counts"]["rows"])

    @property
    def too_many_errors(self) -> bool:
        """Whether the run counts as failed."""
        return self.num_errors / max(1, self.num_rows) > self.max_error_rate

    @property
    def verdict(self) -> str:
        """The message about rows that were set aside; empty if there are none."""
        if not self.num_errors:
            return ""
        share = f"{self.num_errors:,} of {self.num_rows:,} rows were set aside, see {ERRORS}"
        if not self.too_many_errors:
            return share
        return f"Failed: {share}; that is more than --max_error_rate {self.max_error_rate:g}"


def write_reports(job: EncodeJob, num_parts: int, model: Mapping[str, Any], checked: Collection[int] = ()) -> Outcome:
    """Check every part, and write `errors.jsonl` and `manifest.json`; call it when all parts are made.

    Args:
        job: The job.
        num_parts: The number of its parts.
        model: What the manifest says of the model.
        checked: The numbers of parts whose files were compared with their digests just now; the others' are read.

    Raises:
        Gen2EmbedError: A part is missing or damaged, or vectors of unequal widths were made.
    """
    folder = job.folder()
    folder.drop_from(num_parts)
    parts: list[dict[str, Any]] = []
    counts = dict.fromkeys(("rows", "vectors", "errors"), 0)
    widths: set[int] = set()
    num_bytes = halvings = 0
    with folder.owned.scratch() as scratch:
        with (scratch / ERRORS).open("wb") as lines:
            for record in _records(folder, num_parts, checked):
                for error in record.errors:
                    line = dict(zip(("row", "id", "file", "reason"), error, strict=True))
                    # The name of a file may hold a lone surrogate, which JSON writes as `\\udXXX`.
                    lines.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                counts["rows"] += record.num_rows
                counts["vectors"] += record.num_vectors
                counts["errors"] += len(record.errors)
                halvings += record.num_halvings
                widths |= {record.width} if record.files else set()
                num_bytes += sum((folder.path / name).stat().st_size for name in record.files)
                if record.files:
                    parts.append({"number": record.number, "rows": record.num_vectors, "files": record.files})
        if len(widths) > 1:
            raise Gen2EmbedError(f"{folder.path}: vectors of unequal widths {sorted(widths)}; pass another folder")
        folder.owned.adopt(scratch)
    folder.tidy({name for part in parts for name in part["files"]})
    settings = {name: value for name, value in job.settings().items() if name not in ("fingerprint", "side")}
    manifest = {
        "made_by": MADE_BY,
        "version": __version__,
        "format": FORMAT,
        "model": dict(model),
        "fingerprint": job.fingerprint,
        "side": job.options.side,
        "vectors": {
            "count": counts["vectors"],
            "dimensions": widths.pop() if widths else 0,
            "precision": job.options.precision,
            "stored": MEANING[job.options.precision],
            "normalized": True,
        },
        "counts": counts,
        "data": _data_options(job),
        "settings": settings,
        "num_halvings": halvings,
        "parts": parts,
        "errors_file": ERRORS,
        "versions": installed_versions(),
    }
    folder.owned.write_json(MANIFEST, manifest)
    return Outcome(manifest, num_bytes, job.options.max_error_rate)


def _records(folder: PartsFolder, num_parts: int, checked: Collection[int]) -> Iterator[PartRecord]:
    for number in range(num_parts):
        record = folder.find(number, checked=number not in checked)
        if record is None:
            raise Gen2EmbedError(f"{folder.path}: part {number} is missing or damaged; run the same command again")
        yield record


def _data_options(job: EncodeJob) -> dict[str, Any]:
    """Return the options of the input, with which its rows are found again."""
    names = InputOptions.__dataclass_fields__
    return {name: value for name, value in asdict(job.options).items() if name in names}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder.

    Args:
        folder: The output folder of `gen2embed encode`.

    Raises:
        Gen2EmbedError: There is none, or it is not one of ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise Gen2EmbedError(
            f"{folder}: no {MANIFEST} in it; pass the --output_dir of a gen2embed encode that ran to its end"
        )
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["made_by"] == MADE_BY and manifest["format"] == FORMAT and manifest["parts"] is not None:
            return dict(manifest)
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise Gen2EmbedError(f"{path}: no manifest of gen2embed encode; run the command again")
