"""The output folder and what it was made with: a folder of another configuration is refused, never silently reused.

VLM2Vec takes a file of vectors that is there for one that is right, and goes on. So `gen2embed.json` in the folder says
what its vectors were made with, and every later run is compared with it before anything is read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation import installed_versions
from gen2embed_mteb.store import write_json

logger = logging.getLogger(__name__)

RECORD = "gen2embed.json"
VECTORS = ("_qry", "_tgt")
"""How the names of VLM2Vec's files of vectors end, in both generations."""


SOURCES = ("model", "adapter")
"""Settings that say where the weights came from."""


class OutputMismatchError(Gen2EmbedError):
    """The output folder holds what another configuration made."""


def check(folder: Path, settings: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a folder with a configuration; nothing is written.

    Args:
        folder: `--encode_output_path`.
        settings: what decides the vectors, by name.
        datasets: what decides the rows, by dataset; only those that the folder knows are compared.

    Raises:
        OutputMismatchError: the folder was made by something else; names what differs, and the remedy.
    """
    found = read_record(folder)
    remedy = "name another --encode_output_path, or delete this one"
    if found is None:
        foreign = sorted(path.name for path in folder.glob("*") if path.name.endswith(VECTORS) and path.is_file())
        if foreign:
            raise OutputMismatchError(
                f"{folder} holds {', '.join(foreign[:3])}, but no {RECORD}: another backbone's vectors, which would be "
                f"taken for this model's; {remedy}"
            )
        return
    made_with = found.get("settings", {})
    # Paths of one model differ; its fingerprint does not. They are told where that differs.
    differing = _differences(made_with, {name: value for name, value in settings.items() if name not in SOURCES})
    if any(item.startswith("fingerprint") for item in differing):
        differing = _differences(made_with, {name: settings[name] for name in SOURCES if name in settings}) + differing
    for name in datasets.keys() & found.get("datasets", {}).keys():
        differing += _differences(found["datasets"][name], datasets[name], f"{name}: ")
    if differing:
        raise OutputMismatchError(f"{folder} was made with {'; '.join(differing)}; {remedy}")


def claim(
    folder: Path,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
) -> None:
    """Write what a folder's vectors are made with, after `check`; datasets that are there already stay.

    Args:
        folder: `--encode_output_path`; made if missing.
        settings: as for `check`.
        datasets: as for `check`.
        model: facts of the model, for the report.

    Raises:
        OutputMismatchError: as `check`.
    """
    check(folder, settings, datasets)
    folder.mkdir(parents=True, exist_ok=True)
    known = (read_record(folder) or {}).get("datasets", {})
    record = {"settings": dict(settings), "datasets": {**known, **datasets}, "model": dict(model)}
    write_json(folder / RECORD, {**record, "versions": installed_versions()})


def drop_unfinished(folder: Path) -> None:
    """Delete files of vectors that a killed run left half written: VLM2Vec would take them for whole ones.

    Both generations write them as pickles, whose last byte is a full stop; nothing is unpickled here.
    """
    for path in folder.glob("*"):
        if path.name.endswith(VECTORS) and path.is_file() and not is_whole(path):
            logger.warning("%s is half written, by a run that was killed: deleted, its dataset is encoded again", path)
            path.unlink()


def is_whole(path: Path) -> bool:
    """Whether a file of vectors is there and was written to its end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"."


def mirror(folder: Path, other: Path) -> None:
    """Let another folder show the finished datasets of this one: those that v1 does not encode again.

    Args:
        folder: `--encode_output_path`; may be missing.
        other: an empty folder, for a process whose files nobody reads.
    """
    for query in folder.glob(f"*{VECTORS[0]}"):
        pair = [query.with_name(query.name.removesuffix(VECTORS[0]) + ending) for ending in VECTORS]
        if all(is_whole(path) for path in pair):
            for path in pair:
                (other / path.name).symlink_to(path.absolute())


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a folder's vectors were made with; `None` where nothing says so.

    Raises:
        OutputMismatchError: the record cannot be read.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputMismatchError(f"{path} cannot be read ({error}); delete the folder") from error
    return dict(record)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    return [
        f"{where}{name} {found.get(name)!r}, not {wanted[name]!r}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
