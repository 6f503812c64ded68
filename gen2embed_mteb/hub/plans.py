"""What `gen2embed push` sends: named files with sizes and digests, and, with a reason each, what it leaves out.

Cost: every file that is sent is read once, about a second per gigabyte. Nothing is sent here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import is_regular

CARD = "README.md"
_PIECE = 1 << 20
RepoKind = Literal["model", "dataset"]


class LeftOut(NamedTuple):
    """A file or folder that is not sent.

    Attributes:
        name: Its path in the folder, with forward slashes; a folder's ends in one.
        reason: Why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class PlannedFile:
    """A file that is sent.

    Attributes:
        name: Its path in the repository.
        content: The local file, or the bytes of what is written for the hub alone.
        size: In bytes.
        sha256: Its SHA-256, by which the hub knows large files.
        blob: The SHA-1 by which git knows it, and the hub small files.
    """

    name: str
    content: Path | bytes
    size: int
    sha256: str
    blob: str


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Attributes:
        folder: The local folder.
        kind: The kind of repository.
        files: The files, by name.
        left_out: What else is in the folder.
        notes: What the user should know before.
        decisive: Matches the names of files that a loader would find beside ours and mix with them.
    """

    folder: Path
    kind: RepoKind
    files: tuple[PlannedFile, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    decisive: re.Pattern[str]

    @property
    def card(self) -> str:
        """The text of the card; empty if there is none."""
        for file in self.files:
            if file.name == CARD:
                data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
                return data.decode("utf-8", "replace")
        return ""


def planned(name: str, content: Path | bytes) -> PlannedFile:
    """Read a file, and return it with its digests.

    Args:
        name: Its path in the repository.
        content: The local file, or its bytes.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    read = 0
    for piece in _pieces(content):
        sha256.update(piece)
        blob.update(piece)
        read += len(piece)
    if read != size:
        raise Gen2EmbedError(f"{content!s}: changes while it is read; wait until it is complete, then push again")
    return PlannedFile(name, content, size, sha256.hexdigest(), blob.hexdigest())


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def names_in(folder: Path) -> list[str]:
    """Return everything directly in a folder, sorted; the name of a folder ends in a slash."""
    return sorted(path.name + ("/" if path.is_dir() and not path.is_symlink() else "") for path in folder.iterdir())


def fault_of(path: Path) -> str:
    """Return why a file cannot be sent, whatever its name; an empty text if it can."""
    return "" if is_regular(path) else "a link, or no regular file"


def require_folder(path: Path) -> Path:
    """Check that a path is a folder, and return it.

    Raises:
        Gen2EmbedError: It is none.
    """
    if not path.is_dir():
        raise Gen2EmbedError(f"{path}: no such folder; pass what export, train or sample wrote")
    return path
