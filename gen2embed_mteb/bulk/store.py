"""A resumable store of embeddings on disk: shards of vectors, each with a completion marker.

    <store>/manifest.json      our name, and the identity of what makes the vectors (model, prompt, …) with its digest
    <store>/<key>.npy          one shard: (rows, d) float32
    <store>/<key>.json         its marker: our name, the key, the identity's digest, SHA-256 and rows of the shard, and
                               the rows that failed

1. A shard is the result of one fixed piece of work. Its key is the digest of that work (side, texts, images by
   content, the boundaries of the batches), so the same work finds its shard again, and other work does not.
2. A shard is valid once its marker exists. Both are written to a temporary file and renamed, the marker last: a process
   that is killed at any moment leaves a valid store, at worst without its last shard.
3. A store with another identity is refused, so that vectors are never mixed. A file is deleted only if a marker proves
   that we wrote it. Any other file whose name is needed is renamed, not replaced.
4. A marker alone is not trusted: the shard's digest, form and norms are checked whenever it is opened.

Nothing is pickled. Any number of processes, on one host or on several that share the folder, may write at the same
time: the same work gives the same bytes in every process.

Cost: finding a shard reads its file once, for the digest. Vectors are memory-mapped, and a shard's file is open only
while its vectors are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from gen2embed_mteb.bulk.shard_checks import (
    FORMAT,
    DamagedError,
    check_norms,
    parse_marker,
    parse_vectors,
    read_regular,
)
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import (
    ForeignFileError,
    json_bytes,
    remove_proved,
    remove_stale,
    set_aside,
    sha256_of,
)
from gen2embed_mteb.storage.atomic import write_atomic as write_new
from gen2embed_mteb.storage.owned_folder import MADE_BY
from gen2embed_mteb.version import __version__

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOCK = ".gen2embed-store.lock"
_STEM = 32  # digits of the key that name a shard's two files
_MARKER_NAME = re.compile(rf"[0-9a-f]{{{_STEM}}}\.json")


class StoreMismatchError(Gen2EmbedError):
    """The error for a folder that was made by another model, prompt, policy or run."""


@dataclass(frozen=True)
class Shard:
    """The content of a shard.

    Attributes:
        vectors: (rows, d) float32, unit rows; rows that failed hold zeros.
        errors: The file and the reason for each row that failed, by row number.
        num_halvings: The number of times that a batch was halved because memory ran out. Such a shard was encoded in
            other batches than its key says, which may change the last bits.
    """

    vectors: npt.NDArray[np.float32]
    errors: dict[int, tuple[str, str]]
    num_halvings: int = 0


@dataclass(frozen=True)
class StoredShard:
    """A shard on disk that passed the checks; its file is opened only when its vectors are read.

    Attributes:
        path: The file.
        num_rows: The number of its rows.
        width: The width d of a vector; 0 if every row failed.
        errors: As in `Shard`.
        num_halvings: As in `Shard`.
    """

    path: Path
    num_rows: int
    width: int
    errors: dict[int, tuple[str, str]]
    num_halvings: int = 0

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """(rows, d) float32, memory-mapped; the file is open for as long as this array or a view of it is kept."""
        vectors: npt.NDArray[np.float32] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return vectors


class EmbeddingStore:
    """A folder of shards.

    Args:
        directory: The folder; it is created if missing.
        identity: Everything that the vectors depend on besides the work itself, by name.
        overwrite: Whether to delete shards of another identity instead of refusing them. Files that are not proved to
            be ours stay.

    Raises:
        StoreMismatchError: The folder holds vectors of another identity or format.
        ForeignFileError: It holds a `manifest.json` that we did not write; `overwrite` does not change that.
    """

    def __init__(self, directory: str | Path, identity: Mapping[str, str], *, overwrite: bool = False) -> None:
        """Open the store and compare identities."""
        self.directory = Path(directory)
        self.identity = dict(identity)
        self._digest = _digest_of(self.identity)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / LOCK)
        if not self._fits(overwrite):
            with self._lock:
                # Compare again: another process may have created or cleared the store in the meantime.
                if not self._fits(overwrite):
                    self._begin()
        remove_stale(self.directory)

    @staticmethod
    def check(directory: str | Path) -> None:
        """Refuse a folder whose `manifest.json` we did not write; call it before a model is loaded.

        Args:
            directory: The folder; may be missing.

        Raises:
            ForeignFileError: There is such a file.
        """
        _read_manifest(Path(directory) / MANIFEST)

    def get(self, key: str, num_rows: int | None = None) -> StoredShard | None:
        """Return a shard if the store holds it.

        Args:
            key: The digest of the work, 64 hexadecimal digits.
            num_rows: The number of rows that the work has; None accepts any number.

        Returns:
            The shard; None if it is missing or damaged. A warning reports damage; the shard must be computed again.

        Raises:
            OSError: The system cannot read the file (no file descriptor left, a failing disk); it may be intact.
        """
        try:
            return self._read(key, num_rows)
        except DamagedError as error:
            logger.warning("%s: damaged shard (%s); its rows are encoded again", self._path(key), error)
            return None

    def put(self, key: str, shard: Shard) -> StoredShard:
        """Write a shard, then its marker; if another process has finished the same shard meanwhile, keep that one.

        Args:
            key: The digest of the work, 64 hexadecimal digits; the files are named after its beginning.
            shard: The shard.

        Returns:
            The shard on disk.
        """
        buffer = io.BytesIO()
        np.save(buffer, shard.vectors, allow_pickle=False)
        data, path = buffer.getvalue(), self._path(key)
        marker = {
            "made_by": MADE_BY,
            "version": __version__,
            "format": FORMAT,
            "key": key,
            "identity": self._digest,
            "rows": len(shard.vectors),
            "sha256": hashlib.sha256(data).hexdigest(),
            "errors": {str(row): list(fault) for row, fault in sorted(shard.errors.items())},
            "num_halvings": shard.num_halvings,
        }
        with self._lock:
            try:
                found = self._read(key, len(shard.vectors))
            except DamagedError:
                found = None
            if found is not None:
                return found
            self._remove(path.with_suffix(".json"))
            _write(path, data)
            _write(path.with_suffix(".json"), json_bytes(marker))
        rows, width = shard.vectors.shape
        return StoredShard(path, rows, width, shard.errors, shard.num_halvings)

    def _path(self, key: str) -> Path:
        return self.directory / f"{key[:_STEM]}.npy"

    def _read(self, key: str, num_rows: int | None) -> StoredShard | None:
        """Return the shard if it is intact, or None if it has no marker; raise `DamagedError` otherwise."""
        path = self._path(key)
        try:
            marker = parse_marker(read_regular(path.with_suffix(".json")))
        except FileNotFoundError:
            return None
        if marker["key"] != key:
            raise DamagedError("its marker names other work")
        if marker["identity"] != self._digest:
            raise DamagedError("its marker names another model, prompt or setting")
        try:
            data = read_regular(path)
        except FileNotFoundError:
            raise DamagedError("it is missing, its marker is there") from None
        if hashlib.sha256(data).hexdigest() != marker["sha256"]:
            raise DamagedError("its checksum differs from its marker's")
        vectors = parse_vectors(data)
        if len(vectors) != marker["rows"] or (num_rows is not None and len(vectors) != num_rows):
            raise DamagedError(f"it has {len(vectors)} rows, its marker {marker['rows']}, the work {num_rows}")
        errors = {int(row): (str(file), str(reason)) for row, (file, reason) in marker["errors"].items()}
        check_norms(vectors, errors)
        return StoredShard(path, len(vectors), vectors.shape[1], errors, marker["num_halvings"])

    def _fits(self, overwrite: bool) -> bool:
        """Return whether the manifest is ours and has this identity; False if it is missing or must be replaced.

        Raises:
            ForeignFileError: The manifest is not ours.
            StoreMismatchError: It has another identity or format, and may not be replaced.
        """
        path = self.directory / MANIFEST
        manifest = _read_manifest(path)
        if manifest is None:
            return False
        remedy = "pass another --output_dir, or --overwrite to drop these embeddings"
        found, differing = manifest["identity"], ""
        if manifest["format"] != FORMAT:
            differing = f"format {manifest['format']!r}, this version writes {FORMAT}"
        elif found != self.identity:
            names = sorted(name for name in found.keys() | self.identity if found.get(name) != self.identity.get(name))
            listed = (f"{name} is {found.get(name)!r} there and {self.identity.get(name)!r} now" for name in names)
            differing = f"made by another run ({'; '.join(listed)})"
        if differing and not overwrite:
            raise StoreMismatchError(f"{path}: {differing}; {remedy}")
        return not differing

    def _begin(self) -> None:
        """Delete the shards of another identity, and write the manifest."""
        path = self.directory / MANIFEST
        if path.exists():
            logger.warning("%s: dropping embeddings made by another run", self.directory)
            for marker in sorted(self.directory.glob("*.json")):
                if _MARKER_NAME.fullmatch(marker.name):
                    self._remove(marker)
            remove_proved(path, sha256_of(path))  # `_fits` found it to be ours
        manifest = {"made_by": MADE_BY, "version": __version__, "format": FORMAT, "identity": self.identity}
        write_new(path, json_bytes({**manifest, "sha256": self._digest}))

    @staticmethod
    def _remove(marker_path: Path) -> None:
        """Delete a marker of ours and the shard that it proves to be ours; leave any other file.

        The shard is deleted first: a marker without its shard is harmless, but a shard without its marker could no
        longer be proved to be ours.
        """
        try:
            data = read_regular(marker_path)
            marker = parse_marker(data)
        except (DamagedError, FileNotFoundError):
            return
        if marker["key"][:_STEM] == marker_path.stem:
            remove_proved(marker_path.with_suffix(".npy"), marker["sha256"])
            remove_proved(marker_path, hashlib.sha256(data).hexdigest())


def _write(path: Path, data: bytes) -> None:
    """Write a new file; another file of that name that is neither the same nor proved to be ours is renamed."""
    try:
        write_new(path, data)
    except ForeignFileError:
        logger.warning("%s is not proved to be ours; it is kept as %s", path, set_aside(path).name)
        write_new(path, data)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a manifest of ours, of any format; None if there is no manifest.

    Raises:
        ForeignFileError: There is a file that is not a manifest of ours.
    """
    fault = "is no manifest of gen2embed's embeddings"
    try:
        manifest = json.loads(read_regular(path))
        identity, digest = dict(manifest["identity"]), manifest["sha256"]
        if manifest["made_by"] == MADE_BY and "format" in manifest:
            if digest == _digest_of(identity):
                return dict(manifest)
            fault = "was changed since gen2embed wrote it"
    except FileNotFoundError:
        return None
    except (DamagedError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ForeignFileError.of(path, fault)


def _digest_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
