"""A resumable store of embeddings on disk: shards of vectors named by what they hold, each with its completion marker.

    <store>/manifest.json      the identity of whatever makes the vectors (model, prompt, image policy)
    <store>/<key>.npy          one shard: (rows, d) float32
    <store>/<key>.json         its marker: SHA-256 of the shard, rows, and the rows that failed

1. A shard is the result of one fixed piece of work. Its key is the digest of that work (side, texts, images by
   content, the boundaries of the batches), so the same work finds its shard again, and other work cannot.
2. A shard counts once its marker is there. Both are written to a temporary file and renamed, the marker last: a process
   killed at any moment leaves a store that is valid, at worst without its last shard.
3. A store made by something else is refused, never mixed.

Nothing is pickled. Any number of processes, on one host or on several that share the folder, may write at once: the
same work gives the same bytes, whoever does it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
STALE_SECONDS = 3600
"""A temporary file this old belongs to a process that was killed: no shard takes an hour to write."""


class StoreMismatchError(Gen2EmbedError):
    """The store on disk was made by another model, prompt or policy, or cannot be read."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old content or the new one, whatever happens in between.

    Args:
        path: The file; its folder must exist.
        data: The whole content.
    """
    # A name of its own: two processes may write the same file at once.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        num_halvings: How often a batch was halved because memory ran out: such a shard was encoded in other batches
            than its key says, which may show in the last bits.
    """

    vectors: npt.NDArray[np.float32]
    errors: dict[int, tuple[str, str]]
    num_halvings: int = 0


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
        manifest = self.directory / MANIFEST
        if manifest.exists():
            try:
                self._check(manifest)
            except StoreMismatchError:
                if not overwrite:
                    raise
                self._clear()
        if not manifest.exists():
            write_json(manifest, {"format": FORMAT, "identity": self.identity})
        self._remove_stale()

    def get(self, key: str) -> Shard | None:
        """Looks a shard up.

        Args:
            key: The digest of the work.

        Returns:
            The shard, memory-mapped; None if it is not there or damaged (a warning says so; it is to be made again).
        """
        path = self._path(key)
        try:
            marker = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s: damaged marker (%s); its rows are encoded again", path.with_suffix(".json"), error)
            return None
        try:
            if marker["key"] != key:
                raise Gen2EmbedError("its marker names other work")
            if hashlib.sha256(path.read_bytes()).hexdigest() != marker["sha256"]:
                raise Gen2EmbedError("its checksum differs from its marker's")
            return self._shard(path, marker)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: damaged shard (%s); its rows are encoded again", path, error)
            return None

    def put(self, key: str, shard: Shard) -> Shard:
        """Writes a shard, then its marker.

        Args:
            key: The digest of the work; also (its beginning) the files' name.
            shard: The shard.

        Returns:
            The shard as it lies on disk, memory-mapped.
        """
        buffer = io.BytesIO()
        np.save(buffer, shard.vectors, allow_pickle=False)
        data, path = buffer.getvalue(), self._path(key)
        marker = {
            "key": key,
            "rows": len(shard.vectors),
            "sha256": hashlib.sha256(data).hexdigest(),
            "errors": {str(row): list(fault) for row, fault in sorted(shard.errors.items())},
            "num_halvings": shard.num_halvings,
        }
        write_atomic(path, data)
        write_json(path.with_suffix(".json"), marker)
        return self._shard(path, marker)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key[:32]}.npy"

    @staticmethod
    def _shard(path: Path, marker: dict[str, Any]) -> Shard:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        errors = {int(row): (file, reason) for row, (file, reason) in marker["errors"].items()}
        return Shard(vectors, errors, marker["num_halvings"])

    def _check(self, path: Path) -> None:
        remedy = "pass another --output_dir, or --overwrite to drop these embeddings"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, version = dict(manifest["identity"]), manifest["format"]
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

    def _clear(self) -> None:
        """Removes markers before shards, so that a kill in between leaves shards that nothing vouches for."""
        logger.warning("%s: dropping embeddings made by another run", self.directory)
        for pattern in ("*.json", "*.npy"):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        oldest = time.time() - STALE_SECONDS
        for path in self.directory.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process cleans up, too
                if path.stat().st_mtime < oldest:
                    path.unlink()
