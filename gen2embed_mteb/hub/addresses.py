"""Reading files of the hub by address: `hf://datasets/OWNER/NAME@REVISION/FOLDER`, in the grammar of huggingface_hub.

The files are downloaded into the hub's cache, all of one commit, and read there as any local folder; a second call
finds them there. The network is used only for such an address, and not at all where `HF_HUB_OFFLINE` is set.

A hub id may be pinned in the same way where `datasets` loads it: `OWNER/NAME@REVISION`.
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.hub.errors import hub_errors

SCHEME = "hf://"
TABLES = ("*.parquet", "*.jsonl", "*.json", "*.arrow")
"""The files that hold rows, or say of what they are."""
EVERYTHING = ("*",)
"""All files, as for a folder of images."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
"""A hub id, with or without the revision that pins it."""


def is_address(place: str | Path) -> bool:
    """Return whether a place is an address of the hub, not a path or a hub id.

    Args:
        place: What the user passed.
    """
    return str(place).startswith(SCHEME)


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """Return a hub id without its revision, and the revision; None stands for the newest.

    Args:
        hub_id: `OWNER/NAME` or `OWNER/NAME@REVISION`.
    """
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def local_place(place: str | Path, patterns: Sequence[str] = TABLES) -> Path:
    """Return where a place is on this machine; an address of the hub is downloaded.

    Args:
        place: A local path, in which `~` is expanded, or an address.
        patterns: Which files of a folder are downloaded, as shell patterns; one file that is named itself always is.

    Raises:
        DataError: The address cannot be read, or nothing is there.
        HubError: The hub refused it, or cannot be reached.
    """
    if not is_address(place):
        return Path(place).expanduser()
    return _downloaded(str(place), tuple(patterns))


def in_hub_cache(folder: Path) -> bool:
    """Return whether a folder is in the hub's cache, where nothing else may be written.

    Args:
        folder: A folder of `local_place`.
    """
    return any(part.name == "snapshots" and part.parent.name.startswith("datasets--") for part in folder.parents)


@functools.lru_cache
def _downloaded(address: str, patterns: tuple[str, ...]) -> Path:
    """Return the local copy; once found, it stays the same while this process lives, even if a branch moves on."""
    from huggingface_hub import snapshot_download

    place = _parsed(address)
    inside = place.path_in_repo.rstrip("/")
    allowed = list(patterns)
    if inside:
        escaped = glob.escape(inside)
        allowed = [escaped, *(f"{escaped}/{pattern}" for pattern in patterns)]
    with hub_errors(address, "cannot be read"):
        root = Path(snapshot_download(place.id, repo_type=place.type, revision=place.revision, allow_patterns=allowed))
    found = root / inside if inside else root
    if not found.exists() or (found.is_dir() and not any(found.iterdir())):
        raise DataError(f"{address}: there is no {', '.join(patterns)}; check the address and its revision")
    return found


def _parsed(address: str) -> Any:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        place = parse_hf_uri(address)
    except HfUriError as error:
        raise DataError(
            f"{address}: no address of the hub ({error}); write hf://datasets/OWNER/NAME@REVISION/FOLDER"
        ) from error
    if place.type != "dataset":
        raise DataError(
            f"{address}: a {place.type}, and data is read from data sets; write hf://datasets/OWNER/NAME@REVISION"
        )
    if ".." in place.path_in_repo.split("/"):
        raise DataError(f"{address}: its path has '..'; write the path from the root of the repository")
    return place
