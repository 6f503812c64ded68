"""Digests and sizes of image files: read once by one process of a run, and remembered in the folder of the store.

Inputs are compared by the bytes of their images, so every file must be read before anything is encoded. Where there are
many, that is shared among the processes of a run, and not done again by a run that goes on or that follows:

1. The paths are sorted and cut into chunks. Each process reads the chunks that belong to it, as with shards, and writes
   what it found to `images-<key>.json`; the others' it takes from their files (`processes.py`).
2. Beside each digest stands a stamp: times of change, inode and size. A stamp that is another now, or that is younger
   than two seconds when it is taken, so that a later change might not show, is no proof: the file is read again.
3. What is wrong with a file is never remembered.
4. When an image is opened, its bytes are compared with the digest once more (`types.Opener`), so that a vector is never
   stored under the digest of another picture, whatever happened to the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gen2embed_mteb.bulk.preparation import THREADS
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.progress import progress
from gen2embed_mteb.bulk.shard_checks import DamagedError, read_regular
from gen2embed_mteb.bulk.types import Fault
from gen2embed_mteb.errors import is_of_the_system
from gen2embed_mteb.images.decoding import ImageFacts
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.images.source import Images
from gen2embed_mteb.storage.atomic import ForeignFileError, remove_proved, set_aside, write_atomic
from gen2embed_mteb.storage.owned_folder import MADE_BY
from gen2embed_mteb.version import __version__

logger = logging.getLogger(__name__)

MANY = 1000
"""The number of images from which on it pays to share and to remember their facts."""
CHUNK = 1000
FORMAT = 1

_RACY_NS = 2 * 10**9
"""The age below which a stamp is no proof: some file systems know times to a second or two only."""
_Known = dict[str, tuple[list[int], ImageFacts]]


@runtime_checkable
class _Stamped(Protocol):
    """Images whose files tell whether they were changed; `ImageSource` has them."""

    @property
    def settings(self) -> list[int]: ...

    def stamp(self, path: str) -> list[int]: ...


class FactsReader:
    """Reads the facts of images, or finds them.

    Args:
        images: Where the images lie.
        options: How they are resized; images that cannot be are faults.
        folder: The folder of the store; `None`: nothing is remembered.
        share: The part of the work that belongs to this process.
        peers: The other processes.
    """

    def __init__(self, images: Images, options: ImageOptions, folder: Path | None, share: Share, peers: Peers) -> None:
        """Keep the parts."""
        self._images, self._options, self._folder = images, options, folder
        self._share, self._peers = share, peers

    def read(self, paths: Iterable[str], label: str) -> dict[str, ImageFacts | Fault]:
        """Return the facts of images, or what is wrong with them.

        Args:
            paths: The images.
            label: The name of this piece of work in the progress bar.
        """
        new = sorted(paths)
        found: dict[str, ImageFacts | Fault] = {}
        if not new:
            return found
        with ThreadPoolExecutor(THREADS, thread_name_prefix="facts") as pool:
            if self._folder is None or len(new) < MANY or not isinstance(self._images, _Stamped):
                facts = progress(pool.map(self._facts_of, new), len(new), f"{label}: reading images", "image")
                return dict(zip(new, facts, strict=True))
            chunks = [new[start : start + CHUNK] for start in range(0, len(new), CHUNK)]
            keys = {self._key(chunk): number for number, chunk in enumerate(chunks)}
            own = (chunk for number, chunk in enumerate(chunks) if self._share.owns(number))
            for chunk in progress(own, len(chunks), f"{label}: reading images", "chunk"):
                found |= self._chunk(chunk, pool)
            others = {key: number for key, number in keys.items() if not self._share.owns(number)}
            for key, _ in self._peers.await_others(others, self._load):
                found |= self._chunk(chunks[keys[key]], pool)
        return found

    def _facts_of(self, path: str) -> ImageFacts | Fault:
        try:
            return self._checked(path, self._images.facts(path))
        except ImageError as error:
            if is_of_the_system(error):
                raise
            return Fault(error.file, error.reason)

    def _checked(self, path: str, facts: ImageFacts) -> ImageFacts:
        fitted_size(facts.size, self._options, path)
        return facts

    def _chunk(self, paths: list[str], pool: ThreadPoolExecutor) -> dict[str, ImageFacts | Fault]:
        """Return the facts of one chunk; what is not remembered is read, and then remembered."""
        key = self._key(paths)
        remembered = self._load(key)
        known = remembered or {}
        stamps = dict(zip(paths, pool.map(self._stamp, paths), strict=True))
        read = [path for path in paths if path not in known or known[path][0] != stamps[path]]
        found: dict[str, ImageFacts | Fault] = dict(zip(read, pool.map(self._facts_of, read), strict=True))
        kept = {path: known[path] for path in paths if path not in found}
        new: _Known = {}
        for path in read:
            stamp, facts = stamps[path], found[path]
            if stamp is not None and isinstance(facts, ImageFacts):
                new[path] = stamp, facts
        if remembered != kept | new:  # also an empty one, as other processes wait for it
            self._save(key, kept | new)
        for path, (_, remembered_facts) in kept.items():
            try:
                found[path] = self._checked(path, remembered_facts)
            except ImageError as error:
                found[path] = Fault(error.file, error.reason)
        return found

    def _stamp(self, path: str) -> list[int] | None:
        """Return an image's stamp if it proves anything; what is wrong with the file shows when it is read."""
        try:
            stamp = self._images.stamp(path)  # type: ignore[attr-defined]
        except (ImageError, OSError):
            return None
        return list(stamp) if time.time_ns() - max(stamp[:2]) > _RACY_NS else None

    def _key(self, paths: list[str]) -> str:
        settings = self._images.settings  # type: ignore[attr-defined]
        return hashlib.sha256(json.dumps([settings, paths]).encode()).hexdigest()

    def _path(self, key: str) -> Path:
        if self._folder is None:
            raise KeyError(key)
        return self._folder / f"images-{key[:32]}.json"

    def _save(self, key: str, known: Mapping[str, tuple[list[int], ImageFacts]]) -> None:
        rows = {path: [stamp, facts.digest, *facts.size] for path, (stamp, facts) in known.items()}
        head = {"made_by": MADE_BY, "version": __version__, "format": FORMAT, "key": key}
        data = json.dumps({**head, "sha256": _digest_of(rows), "images": rows}).encode()
        path = self._path(key)
        if self._load(key) is not None:
            remove_proved(path, hashlib.sha256(path.read_bytes()).hexdigest())
        try:
            write_atomic(path, data)
        except ForeignFileError:
            if self._load(key) is not None:  # another process was quicker
                return
            logger.warning("%s is not proved to be ours; it is kept as %s", path, set_aside(path).name)
            write_atomic(path, data)

    def _load(self, key: str) -> _Known | None:
        """Return what a chunk's file remembers; None if there is none, or it is not as it was written."""
        path = self._path(key)
        try:
            content = json.loads(read_regular(path))
            rows = content["images"]
            if [content[name] for name in ("made_by", "format", "key", "sha256")] != [
                *(MADE_BY, FORMAT, key),
                _digest_of(rows),
            ]:
                return None
            return {
                path: ([int(number) for number in stamp], ImageFacts(str(digest), (int(width), int(height))))
                for path, (stamp, digest, width, height) in rows.items()
            }
        except (FileNotFoundError, DamagedError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def _digest_of(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
