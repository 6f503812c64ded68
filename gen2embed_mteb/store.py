"""A resumable store of embeddings on disk: shards of vectors named by what they hold, and one manifest.

1. A shard is the result of one fixed piece of work. Its key is the digest of that work (side, texts, images, the
   boundaries of the batches), so the same work finds its shard again, and other work cannot.
2. A shard counts once the manifest lists it with its SHA-256. Both are written to a temporary file and renamed: a
   process killed at any moment leaves a store that is valid, at worst without its last shard.
3. The manifest also holds the identity of whatever made the vectors (model, prompt, resize policy). A store made by
   something else is refused, never mixed.

Nothing is pickled: shards are plain `.npy` files. One process writes at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


class StoreMismatchError(ValueError):
    """The store on disk was made by another model, prompt or policy, or cannot be read."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old content or the new one, whatever happens in between.

    Args:
        path: The file; its folder must exist.
        data: The whole content.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, indented, keys in the order given.

    Args:
        path: The file; its folder must exist.
        value: Anything that JSON can hold; NaN is refused.

    Raises:
        ValueError: The value holds NaN or an infinity, which are no JSON.
    """
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        vectors: (rows, d) float32; rows that failed hold zeros.
        errors: Row number to [file, reason], for the rows that failed.
    """

    vectors: npt.NDArray[np.float32]
    errors: dict[int, tuple[str, str]]


class EmbeddingStore:
    """A folder of shards.

    Args:
        directory: The folder; made if it is missing.
        identity: What the vectors depend on besides the work itself, by name.
        overwrite: Drop what is there when it was made by another identity (or is unreadable) instead of refusing it.

    Raises:
        StoreMismatchError: The folder holds vectors of another identity, or a manifest that cannot be read.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, str], *, overwrite: bool = False) -> None:
        """Opens the store and compares identities."""
        self.directory = Path(directory)
        self.identity = dict(identity)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, dict[str, Any]] = {}
        try:
            self._shards = self._read_manifest()
        except StoreMismatchError:
            if not overwrite:
                raise
            self._clear()

    def get(self, key: str) -> Shard | None:
        """Looks a shard up.

        Args:
            key: The digest of the work.

        Returns:
            The shard, memory-mapped; None if it is not there or damaged (a warning says so; it is to be made again).
        """
        entry = self._shards.get(key)
        if entry is None:
            return None
        path = self.directory / entry["file"]
        try:
            if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                raise ValueError("its checksum differs from the manifest")
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            logger.warning("%s: damaged shard (%s); its rows are encoded again", path, error)
            return None
        return Shard(vectors, {int(row): (file, reason) for row, (file, reason) in entry["errors"].items()})

    def put(self, key: str, shard: Shard) -> None:
        """Writes a shard and lists it in the manifest.

        Args:
            key: The digest of the work; also (its beginning) the file's name.
            shard: The shard.
        """
        buffer = io.BytesIO()
        np.save(buffer, shard.vectors, allow_pickle=False)
        data = buffer.getvalue()
        name = f"{key[:32]}.npy"
        write_atomic(self.directory / name, data)
        self._shards[key] = {
            "file": name,
            "rows": len(shard.vectors),
            "sha256": hashlib.sha256(data).hexdigest(),
            "errors": {str(row): list(fault) for row, fault in sorted(shard.errors.items())},
        }
        write_json(self.directory / MANIFEST, {"format": FORMAT, "identity": self.identity, "shards": self._shards})

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.directory / MANIFEST
        if not path.exists():
            return {}
        remedy = "pass another --output_dir, or --overwrite to drop these embeddings"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, version = dict(manifest["identity"]), manifest["format"]
            shards: dict[str, dict[str, Any]] = manifest["shards"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreMismatchError(f"{path}: not a manifest of embeddings ({error!r}); {remedy}") from error
        if version != FORMAT:
            raise StoreMismatchError(f"{path}: format {version}, this version writes {FORMAT}; {remedy}")
        differing = [
            f"{name} is {found.get(name)!r} there and {self.identity.get(name)!r} now"
            for name in sorted(found.keys() | self.identity.keys())
            if found.get(name) != self.identity.get(name)
        ]
        if differing:
            raise StoreMismatchError(f"{path}: made by another run ({'; '.join(differing)}); {remedy}")
        return shards

    def _clear(self) -> None:
        """Removes the manifest first, so that a kill in between leaves shards that nothing lists."""
        logger.warning("%s: dropping embeddings made by another run", self.directory)
        (self.directory / MANIFEST).unlink(missing_ok=True)
        for path in self.directory.glob("*.npy"):
            path.unlink()
