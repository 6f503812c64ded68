"""Where a benchmark's images lie: a folder, or the zip archive it was shipped in; elsewhere only if the user says so.

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

from gen2embed_mteb.images.decoding import MAX_PIXELS, ImageFacts, decode, digest_of, facts_of
from gen2embed_mteb.images.errors import ImageError, reason_of
from gen2embed_mteb.images.files import MAX_FILE_BYTES, confined, open_regular, read_file, refuse_address, stamp_of
from gen2embed_mteb.images.kept_bytes import KeptBytes
from gen2embed_mteb.images.remote import protocol_of, read_remote
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
        remote_images: Which addresses are read beside the paths of the folder; see `remote.require_allowed_names`.

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
        remote_images: Sequence[str] = (),
    ) -> None:
        """Check that `path` can be read; open nothing yet."""
        self.path = Path(path)
        self.max_pixels = max_pixels
        self.max_file_bytes = max_file_bytes
        self.follow_links = follow_links
        self.exif_orientation = exif_orientation
        self.remote_images = tuple(remote_images)
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
            path: Relative to the folder or to the root of the archive, with forward slashes; or an address that
                `remote_images` allows.

        Returns:
            The first frame, mode RGB, fully decoded.

        Raises:
            ImageError: Missing, outside of the source, too large, of another format, or damaged.
        """
        digest, data = self._expected.pop(path, ("", None))
        if data is None:
            kept = self._kept.get(path)
            data = self.read(path) if kept is None else kept
            if digest and digest_of(data) != digest:
                raise ImageError(path, "was changed while it was in use", "run the same command again")
        return self.decoded(path, data)

    def expect(self, path: str, digest: str, data: bytes | None = None) -> None:
        """Say what `open` is to find under a path when it is called for the next time.

        Args:
            path: As for `open`.
            digest: The digest of the file's bytes, as in `ImageFacts`; another file is an `ImageError`.
            data: The bytes, if they were read before; the file is then not read.
        """
        self._expected[path] = digest, data

    def decoded(self, path: str, data: bytes) -> Image.Image:
        """Decode one image whose file was read before.

        Args:
            path: As for `open`.
            data: What `read` returned.

        Raises:
            ImageError: As for `open`.
        """
        return decode(io.BytesIO(data), path, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)

    def kept_bytes(self, path: str) -> bytes | None:
        """Return the file of an image as `facts` read it, if it is still kept."""
        return self._kept.get(path)

    def facts(self, path: str) -> ImageFacts:
        """Return the digest of a file and the size of its image; the file is read, but its pixels are not decoded.

        The file's bytes are kept for `open`, among the last quarter of a GiB that was read.

        Args:
            path: As for `open`.

        Raises:
            ImageError: As for `open`, but for damage behind the header.
        """
        data = self.read(path)
        self._kept.put(path, data)
        return facts_of(data, path, max_pixels=self.max_pixels, exif_orientation=self.exif_orientation)

    @property
    def settings(self) -> list[int]:
        """The settings that decide which facts an image has."""
        return [self.max_pixels, self.max_file_bytes, int(self.exif_orientation)]

    def num_bytes(self, path: str) -> int:
        """Return the size of an image's file in bytes, which is read for that.

        Args:
            path: As for `open`.

        Raises:
            ImageError: As for `open`, but for damage.
        """
        return len(self.read(path))

    def stamp(self, path: str) -> list[int]:
        """Return what changes with an image's file: when it was changed, its inode and size; and of a zip member more.

        Args:
            path: As for `open`.

        Raises:
            ImageError: The file is missing, or outside of the source; or it is on another machine.
            OSError: The system cannot look at it.
        """
        if self._is_remote(path):
            raise ImageError(path, "when it was changed is not known", "read it")
        if self.zipped:
            member = self._member(path)
            return [*stamp_of(self.path), member.CRC, member.file_size, member.header_offset]
        return stamp_of(confined(path, self.path, follow_links=self.follow_links))

    def read(self, path: str) -> bytes:
        """Read the file of one image; arguments and errors are those of `open`."""
        if self._is_remote(path):
            return read_remote(path, self.remote_images, self.max_file_bytes)
        if self.zipped:
            return self._member_bytes(path)
        return read_file(path, self.path, self.max_file_bytes, follow_links=self.follow_links)

    def _is_remote(self, path: str) -> bool:
        return bool(self.remote_images and protocol_of(path))

    def __getstate__(self) -> dict[str, object]:
        """Leave open handles and locks behind, so that a source can be sent to a spawned worker."""
        return {
            key: value
            for key, value in vars(self).items()
            if key not in ("_archive", "_lock", "_pid", "_kept", "_expected")
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a source sent by another process."""
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        self._kept = KeptBytes()
        self._expected: dict[str, tuple[str, bytes | None]] = {}
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
