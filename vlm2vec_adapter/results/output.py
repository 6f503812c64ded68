"""The output folder and a record of its configuration: a folder of another configuration is refused, never reused.

VLM2Vec assumes that an existing file of vectors is right, and unpickles it. So `gen2embed.json` in the folder records
the settings of its vectors and the SHA-256 of every such file; every later run is compared with this record before any
file is read.

1. The folder's ledger (`storage.owned_folder`) proves that we wrote the record; a copied or edited record is not valid.
2. The record names the files of a run before VLM2Vec writes the first of them. A file of one of the run's datasets that
   the record does not name is foreign, and the folder is refused.
3. A file that the record names, but with another digest, is incomplete or was changed. It is renamed, never deleted,
   and its dataset is encoded again.

Cost: files of vectors are read once for their digest.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.storage.atomic import set_aside, sha256_of
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from vlm2vec_adapter.results.vector_files import VECTORS, FileEntry

logger = logging.getLogger(__name__)

RECORD = "gen2embed.json"
WRITER = "vlm2vec"
RUN_LOCK = ".gen2embed-run.lock"
SCORE, INFO = "_score.json", "_info.jsonl"
PRODUCTS = (*VECTORS, SCORE, INFO, "_pred.txt", "_pred.jsonl")
"""The ends of the names of files that VLM2Vec writes for a dataset."""
SOURCES = ("model", "adapter")
"""The settings that name the source of the weights."""

_REMEDY = "name another --encode_output_path, or move the files away"


class OutputMismatchError(Gen2EmbedError):
    """The error for an output folder that another configuration wrote."""


def check(folder: Path, settings: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a folder with a configuration; nothing is written.

    Args:
        folder: `--encode_output_path`.
        settings: The settings that decide the vectors, by name.
        datasets: The settings that decide the rows, by dataset; only datasets in the record are compared.

    Raises:
        OutputMismatchError: Another configuration wrote the folder, or it holds foreign files that VLM2Vec would read
            or replace; the message names the differences and the remedy.
    """
    found = read_record(folder)
    if found is None:
        _refuse_vectors(folder)
    elif not OwnedFolder(folder, WRITER).owns(RECORD):
        raise OutputMismatchError(
            f"{folder / RECORD} is a copy, was changed, or is of a version that kept no digests: it proves nothing "
            f"about the vectors there; {_REMEDY}"
        )
    made_with, known, files = (({} if found is None else found[part]) for part in ("settings", "datasets", "files"))
    # Copies of one model have different paths but the same fingerprint. Paths are reported only if the latter differs.
    differing = _differences(made_with, {name: value for name, value in settings.items() if name not in SOURCES})
    if any(item.startswith("fingerprint") for item in differing):
        differing = _differences(made_with, {name: settings[name] for name in SOURCES if name in settings}) + differing
    for name in datasets.keys() & known.keys():
        differing += _differences(known[name], datasets[name], f"{name}: ")
    if differing:
        raise OutputMismatchError(f"{folder} was made with {'; '.join(differing)}; {_REMEDY}")
    for name in datasets:
        for ending in PRODUCTS:
            path = folder / f"{name}{ending}"
            named = path.name in files if ending in VECTORS else name in known
            if os.path.lexists(path) and not (named and path.is_file() and not path.is_symlink()):
                raise OutputMismatchError(
                    f"{path} was not written by a run of this project, and would be taken for one of its files; "
                    f"{_REMEDY}"
                )


def _refuse_vectors(folder: Path) -> None:
    foreign = sorted(path.name for path in folder.glob("*") if path.name.endswith(VECTORS))
    if foreign:
        raise OutputMismatchError(
            f"{folder} holds {', '.join(foreign[:3])}, but no {RECORD}: another backbone's vectors, which would be "
            f"taken for this model's; {_REMEDY}"
        )


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
) -> None:
    """Write the record of a folder, after `check`; datasets that are in it already stay.

    Args:
        folder: `--encode_output_path`; it is created if missing.
        settings: As for `check`.
        datasets: As for `check`.
        model: Facts about the model, for the report.

    Raises:
        OutputMismatchError: As `check`.
    """
    check(folder, settings, datasets)
    earlier = read_record(folder) or {"datasets": {}, "files": {}}
    expected = {f"{name}{ending}": None for name in datasets for ending in VECTORS}
    record = {
        "settings": dict(settings),
        "datasets": {**earlier["datasets"], **datasets},
        "model": dict(model),
        "files": {**expected, **earlier["files"]},
    }
    _write(folder, {**record, "versions": installed_versions()})


def note(folder: Path, name: str, entry: FileEntry) -> None:
    """Write the digest of a file of vectors to the record.

    Args:
        folder: `--encode_output_path`, after `claim`.
        name: The file's name.
        entry: Its entry in the record.
    """
    record = read_record(folder) or {}
    _write(folder, {**record, "files": {**record.get("files", {}), name: entry}})


def noted(folder: Path, name: str) -> FileEntry | None:
    """Return the entry of a file of vectors in the record; `None` if there is none, or the record is not valid."""
    record = read_record(folder)
    if record is None or not OwnedFolder(folder, WRITER).owns(RECORD):
        return None
    entry: FileEntry | None = record["files"].get(name)
    return entry


def is_whole(folder: Path, name: str) -> bool:
    """Return whether a file of vectors exists and has the digest in the record."""
    path, entry = folder / name, noted(folder, name)
    return (
        entry is not None
        and path.is_file()
        and not path.is_symlink()
        and path.stat().st_size == entry["size"]
        and sha256_of(path) == entry["sha256"]
    )


def set_aside_unfinished(folder: Path, datasets: Iterable[str]) -> None:
    """Rename files that a killed run left incomplete, since VLM2Vec would use them as complete files.

    The score of such a dataset is renamed too, since V2 would report an existing score.

    Args:
        folder: `--encode_output_path`, after `check`.
        datasets: The run's datasets.
    """
    for name in datasets:
        damaged = [name + ending for ending in VECTORS if (folder / (name + ending)).exists()]
        damaged = [file for file in damaged if not is_whole(folder, file)]
        if (folder / f"{name}{INFO}").exists() and not _has_every_row(folder, name):
            damaged.append(f"{name}{INFO}")
        for file in damaged:
            kept = set_aside(folder / file)
            logger.warning(
                "%s is half written or was changed since: renamed %s, its dataset is encoded again",
                folder / file,
                kept.name,
            )
        if damaged and (folder / f"{name}{SCORE}").exists():
            set_aside(folder / f"{name}{SCORE}")


def _has_every_row(folder: Path, name: str) -> bool:
    """Return whether V2's file of facts about the queries has as many lines as there are query vectors."""
    entry = noted(folder, f"{name}{VECTORS[0]}")
    data = (folder / f"{name}{INFO}").read_bytes()
    return entry is not None and data.count(b"\n") == entry["rows"] and (data.endswith(b"\n") or not data)


def mirror(folder: Path, other: Path) -> dict[str, FileEntry]:
    """Make the finished datasets of this folder visible in another one, so that v1 does not encode them again.

    Args:
        folder: `--encode_output_path`; may be missing.
        other: An empty folder, for a process whose files are not used.

    Returns:
        The entries of the visible files in the record, by name.
    """
    shown: dict[str, FileEntry] = {}
    for query in sorted(folder.glob(f"*{VECTORS[0]}")):
        names = [query.name.removesuffix(VECTORS[0]) + ending for ending in VECTORS]
        if all(is_whole(folder, name) for name in names):
            for name in names:
                (other / name).symlink_to((folder / name).absolute())
                entry = noted(folder, name)
                if entry is not None:
                    shown[name] = entry
    return shown


def lock(folder: Path) -> FileLock:
    """Lock a folder while this run writes to it: a second run would rename files that are incomplete.

    Args:
        folder: `--encode_output_path`; it is created if missing.

    Returns:
        The lock; it is held until the object is deleted or the process ends.

    Raises:
        OutputMismatchError: Another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / RUN_LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise OutputMismatchError(
            f"{folder}: another run is writing there; wait for its end, or name another --encode_output_path"
        ) from error
    return held


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a folder.

    Returns:
        The record, after checking the types of its parts; `None` if there is none.

    Raises:
        OutputMismatchError: The record cannot be read.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise Gen2EmbedError("no regular file")
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise Gen2EmbedError("not an object")
        record.setdefault("files", {})
        for part in ("settings", "datasets", "model", "files"):
            if not isinstance(record.get(part), dict):
                raise Gen2EmbedError(f"{part} is not an object")
        for name, task in record["datasets"].items():
            if not isinstance(task, dict):
                raise Gen2EmbedError(f"datasets: {name} is not an object")
        for name, entry in record["files"].items():
            if entry is not None and not _is_entry(entry):
                raise Gen2EmbedError(f"files: {name} has no sha256, size and rows")
    except RecursionError as error:
        raise OutputMismatchError(f"{path} cannot be read (nested too deeply); {_REMEDY}") from error
    except ValueError as error:
        raise OutputMismatchError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    return record


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and bool(re.fullmatch("[0-9a-f]{64}", entry["sha256"]))
        and all(type(entry.get(name)) is int and entry[name] >= 0 for name in ("size", "rows"))
    )


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    OwnedFolder(folder, WRITER).write_json(RECORD, record)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    return [
        f"{where}{name} {found.get(name)!r}, not {wanted[name]!r}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
