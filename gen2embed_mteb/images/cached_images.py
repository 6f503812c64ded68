"""Images that are embedded in a table: each is written to a file once, named by its SHA-256, and then opened by path.

The threads that open images work from paths, so an embedded image needs one. Its bytes are compared with their SHA-256
at every read from disk.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from gen2embed_mteb.images.decoding import ImageFacts, decode, facts_of
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.files import confined, read_file, stamp_of
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage.atomic import ForeignFileError, write_atomic

EMBEDDED = "embedded:"
"""The prefix in the path of an image that was embedded in a table; the rest of the path is the image's SHA-256."""


class CachedImages(ImageSource):
    """Opens images by path, also those that were embedded in a table.

    Args:
        root: The folder or archive of the images with a path; None if there are none.
        cache: The folder of the embedded images; made when the first one is kept.
        options: As for `ImageSource`: `follow_links`, `exif_orientation`.
    """

    def __init__(self, root: Path | None, cache: Path, **options: Any) -> None:
        """Check the root."""
        if root is None:
            cache.mkdir(parents=True, exist_ok=True)
        super().__init__(root if root is not None else cache, **options)
        self._cache = cache
        self._written: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        """Leave behind which images were kept here, too, so that a source that is sent elsewhere stays small."""
        return super().__getstate__() | {"_written": set()}

    def keep(self, data: bytes) -> str:
        """Write an encoded image to the cache, unless it is there.

        Args:
            data: The bytes of an image file.

        Returns:
            The path under which `open` finds it.

        Raises:
            ForeignFileError: The cache holds another content under the image's digest.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._written:
            target = self._cache / digest[:2] / digest
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_atomic(target, data)
            except ForeignFileError as error:
                raise ForeignFileError(
                    f"{target}: damaged, its content is not what its name says; delete it"
                ) from error
            self._written.add(digest)
        return EMBEDDED + digest

    def decoded(self, path: str, data: bytes) -> Image.Image:
        """Decode one image; see `ImageSource.decoded`."""
        if self._place(path) is None:
            return super().decoded(path, data)
        return decode(io.BytesIO(data), path, max_pixels=self.max_pixels)

    def facts(self, path: str) -> ImageFacts:
        """Return digest and size of an image; see `ImageSource.facts`."""
        if self._place(path) is None:
            return super().facts(path)
        data = self.read(path)
        self._kept.put(path, data)
        return facts_of(data, path, max_pixels=self.max_pixels)

    def stamp(self, path: str) -> list[int]:
        """Return what changes with an image's file; see `ImageSource.stamp`."""
        place = self._place(path)
        return super().stamp(path) if place is None else stamp_of(confined(place, self._cache))

    def read(self, path: str) -> bytes:
        """Read the file of an image, and compare an embedded one with its digest; see `ImageSource.read`."""
        place = self._place(path)
        if place is None:
            return super().read(path)
        data = read_file(place, self._cache, self.max_file_bytes)
        if hashlib.sha256(data).hexdigest() != path.removeprefix(EMBEDDED):
            reason = f"{self._cache / place} is damaged, its content is not what its name says"
            raise ImageError(path, reason, "delete it")
        return data

    @staticmethod
    def _place(path: str) -> str | None:
        """Return the file of an embedded image, relative to the cache; None for any other path."""
        digest = path.removeprefix(EMBEDDED)
        if digest == path or not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        return f"{digest[:2]}/{digest}"
