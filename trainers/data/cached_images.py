"""Images that are embedded in a table: written once each, under their SHA-256, since threads open images by path."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from gen2embed_mteb.images.decoding import ImageFacts, decode, facts_of
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.files import read_file
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage.atomic import ForeignFileError, write_atomic

EMBEDDED = "embedded:"
"""What the path of an image begins with that was embedded in a table; the rest is its SHA-256."""


class CachedImages(ImageSource):
    """Images by path, and those that were embedded in a table.

    Args:
        root: Folder or archive of the images with a path; None where there are none.
        cache: Folder of the embedded ones; made when the first is kept.
        options: As for `ImageSource`: `follow_links`, `exif_orientation`.
    """

    def __init__(self, root: Path | None, cache: Path, **options: Any) -> None:
        """Check the root."""
        if root is None:
            cache.mkdir(parents=True, exist_ok=True)
        super().__init__(root if root is not None else cache, **options)
        self._cache = cache
        self._kept: set[str] = set()

    def keep(self, data: bytes) -> str:
        """Keep an encoded image.

        Args:
            data: The bytes of an image file.

        Returns:
            The path under which `open` finds it.

        Raises:
            ForeignFileError: The cache holds something else under its digest.
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._kept:
            target = self._cache / digest[:2] / digest
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_atomic(target, data)
            except ForeignFileError as error:
                raise ForeignFileError(
                    f"{target}: damaged, its content is not what its name says; delete it"
                ) from error
            self._kept.add(digest)
        return EMBEDDED + digest

    def open(self, path: str) -> Image.Image:
        """Open one image as RGB; see `ImageSource.open`."""
        data = self._embedded(path)
        return super().open(path) if data is None else decode(io.BytesIO(data), path, max_pixels=self.max_pixels)

    def facts(self, path: str) -> ImageFacts:
        """Digest and size; see `ImageSource.facts`."""
        data = self._embedded(path)
        return super().facts(path) if data is None else facts_of(data, path, max_pixels=self.max_pixels)

    def _embedded(self, path: str) -> bytes | None:
        """Return the bytes of an embedded image, compared with their digest; None for any other path."""
        digest = path.removeprefix(EMBEDDED)
        if digest == path or not re.fullmatch("[0-9a-f]{64}", digest):
            return None
        name = f"{digest[:2]}/{digest}"
        data = read_file(name, self._cache, self.max_file_bytes)
        if hashlib.sha256(data).hexdigest() != digest:
            reason = f"{self._cache / name} is damaged, its content is not what its name says"
            raise ImageError(path, reason, "delete it")
        return data
