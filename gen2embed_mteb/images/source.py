"""Where a benchmark's images lie: a folder, or the zip archive it was shipped in; never anywhere else.

MMEB ships `images.zip`. Unpacking it is a choice, not a duty: `ImageSource` reads either, with the same paths, the
same limits and the same `ImageError`, from any thread and after a fork.
"""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast

from PIL import Image

from gen2embed_mteb.images.decoding import MAX_PIXELS, ImageFacts, decode, facts_of
from gen2embed_mteb.images.errors import ImageError, reason_of
from gen2embed_mteb.images.files import MAX_FILE_BYTES, open_regular, read_file, refuse_address
from gen2embed_mteb.images.resizing import ImageOptions, fitted

MAX_DIRECTORY_BYTES = 2**30
"""The largest table of contents of an archive: some ten million files."""


class Images(Protocol):
    """Opens images by name, wherever they are; `ImageSource` finds them on disk."""

    def open(self, path: str, /) -> Image.Image:
        """Open one image as RGB."""

    def facts(self, path: str, /) -> ImageFacts:
        """Return an image's digest and size."""


class ImageSource:
    """A folder or a zip archive of images.

    Args:
        path: The folder, or a file that ends in `.zip`.
        max_pixels: The largest width x height accepted.
        max_file_bytes: The largest file, or unpacked size of one zip member.
        follow_links: Whether links in the folder may lead out of it; see `files.confined`.
        exif_orientation: Whether images are turned as their EXIF data says; see `decoding.open_image`.

    Raises:
        FileNotFoundError: Neither a folder nor a zip archive lies at `path`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_pixels: int = MAX_PIXELS,
        max_file_bytes: int = MAX_FILE_BYTES,
        follow_links: bool = False,
        exif_orientation: bool = False,
    ) -> None:
        """Check that `path` can be read; open nothing yet."""
        self.path = Path(path)
        self.max_pixels = max_pixels
        self.max_file_bytes = max_file_bytes
        self.follow_links = follow_links
        self.exif_orientation = exif_orientation
        self.zipped = self.path.is_file()
        if not self.zipped and not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: no such folder or zip archive; pass an existing --image_dir")
        if self.zipped:
            with open_regular(self.path) as file:
                if not zipfile.is_zipfile(file):
                    raise FileNotFoundError(
                        f"{self.path}: not a zip archive; pass a folder or a .zip file as --image_dir"
                    )
        self._reset()

    def open(self, path: str) -> Image.Image:
        """Open one image as RGB.

        Args:
            path: Relative to the folder or to the root of the archive, with forward slashes.

        Returns:
            The first frame, mode RGB, fully decoded.

        Raises:
            ImageError: Missing, outside of the source, too large, of another format, or damaged.
        """
        return decode(
            io.BytesIO(self._bytes(path)), path, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation
        )

    def facts(self, path: str) -> ImageFacts:
        """Return the digest of a file and the size of its image; the file is read, but its pixels are not decoded.

        Args:
            path: As for `open`.

        Raises:
            ImageError: As for `open`, but for damage behind the header.
        """
        return facts_of(self._bytes(path), path, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)

    def num_bytes(self, path: str) -> int:
        """Return the size of an image's file in bytes, which is read for that.

        Args:
            path: As for `open`.

        Raises:
            ImageError: As for `open`, but for damage.
        """
        return len(self._bytes(path))

    def _bytes(self, path: str) -> bytes:
        if self.zipped:
            return self._member_bytes(path)
        return read_file(path, self.path, self.max_file_bytes, follow_links=self.follow_links)

    def __getstate__(self) -> dict[str, object]:
        """Leave open handles and locks behind, so that a source can be sent to a spawned worker."""
        return {key: value for key, value in vars(self).items() if key not in ("_archive", "_lock", "_pid")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a source sent by another process."""
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def _open_archive(self) -> zipfile.ZipFile:
        with self._lock:
            if self._archive is None:
                self._archive = zipfile.ZipFile(cast(IO[bytes], _Bounded(open_regular(self.path))))
            return self._archive

    def _member(self, path: str) -> zipfile.ZipInfo:
        if self._pid != os.getpid():
            # After a fork the file position is shared with the parent, and a lock may be held by a thread that does
            # not exist here: start afresh.
            self._reset()
        refuse_address(path)
        parts = PurePosixPath(path).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise ImageError(path, f"leads outside of {str(self.path)!r}", "correct the path in the data")
        try:
            return self._open_archive().getinfo("/".join(parts))
        except KeyError as error:
            raise ImageError(path, f"not found in {str(self.path)!r}", "check --image_dir") from error
        except OSError:
            raise  # the archive itself is gone, or the system is out of file descriptors: no fault of this image
        except Exception as error:  # a table of contents can be damaged in a dozen ways, each with its own exception
            reason = f"{self.path}: unreadable archive ({reason_of(error)})"
            raise ImageError(path, reason, "download it again") from error

    def _member_bytes(self, path: str) -> bytes:
        member = self._member(path)
        if member.file_size > self.max_file_bytes:
            raise ImageError(
                path, f"{member.file_size} bytes unpacked exceed the limit of {self.max_file_bytes}", "drop the row"
            )
        try:
            # `ZipFile` guards its file position itself, so that threads inflate and decode side by side.
            with self._open_archive().open(member) as file:
                # The header may lie about the size, so the read is bounded as well.
                data = file.read(self.max_file_bytes + 1)
        except Exception as error:  # encrypted, a compression that Python lacks, or whatever its decoders raise
            reason = f"damaged in {str(self.path)!r} ({reason_of(error)})"
            raise ImageError(path, reason, "download the archive again") from error
        if len(data) > self.max_file_bytes:
            raise ImageError(path, f"unpacks to more than {self.max_file_bytes} bytes", "drop the row")
        return data


class _Bounded:
    """An archive's file that never reads more at once than a table of contents can have: a sparse file may claim any.

    Args:
        file: The open archive.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its table of contents claims {size} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def open_input(images: Images, text: str, paths: Sequence[str], options: ImageOptions) -> dict[str, Any]:
    """Open what a text and some paths stand for, as encoders and trainers take it.

    Args:
        images: Where the images lie.
        text: The text; empty alone it is still an input, since the prompt surrounds it.
        paths: The images.
        options: The size to which they are brought; see `resizing.fitted`.

    Returns:
        `{"text": str, "image": PIL image or list of them}`, without what there is not.

    Raises:
        ImageError: An image cannot be opened, or would have to be enlarged beyond the limit.
    """
    opened = [fitted(images.open(path), options, path) for path in paths]
    entry: dict[str, Any] = {}
    if text or not opened:
        entry["text"] = text
    if opened:
        entry["image"] = opened[0] if len(opened) == 1 else opened
    return entry
