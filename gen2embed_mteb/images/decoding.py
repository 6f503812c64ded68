"""Opening images safely: a fixed list of formats, size limits, RGB, and one kind of error that names the remedy.

Benchmarks of this field contain hundreds of thousands of downloaded images, so this module assumes that some are broken
and trusts none: only the formats listed here are decoded, an image with too many pixels (a "decompression bomb") is
refused before memory for them is allocated, and every fault becomes an `ImageError` that the caller can count.
`source.py` finds images in a folder or a zip archive, `files.py` reads their files, and `resizing.py` brings them to
the size for the processor.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from gen2embed_mteb.images.errors import ImageError, reason_of
from gen2embed_mteb.images.files import MAX_FILE_BYTES, read_file
from gen2embed_mteb.images.modes import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are decoded. Pillow knows about forty; no benchmark needs the others, and each is a risk."""

MAX_PIXELS = 89_478_485
"""The largest number of pixels of an image (the threshold of Pillow's own warning; a quarter of a GiB in RGB)."""

MAX_SCANS = 100
"""The most scans of a JPEG; each scan processes every pixel again (libtiff's limit; encoders write about ten)."""

_MAX_SEGMENTS = 100_000
# A marker of a JPEG segment that has a length; markers inside the pixels' data are excluded.
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
_END, _SCAN = 0xD9, 0xDA


Size = tuple[int, int]
"""Width and height of an image, in pixels."""


def open_image(
    path: str | Path,
    root: str | Path | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_FILE_BYTES,
    follow_links: bool = False,
    exif_orientation: bool = False,
) -> Image.Image:
    """Open an image file as RGB.

    Args:
        path: The file; relative to `root` when that is given.
        root: If given, the folder that must contain the file; see `files.confined`.
        max_pixels: The largest accepted product of width and height.
        max_bytes: The largest accepted file.
        follow_links: Whether links in `root` may lead out of it.
        exif_orientation: Whether to turn the image as its EXIF data says; VLM2Vec and the official code do not.

    Returns:
        The first frame, mode RGB, fully decoded.

    Raises:
        ImageError: The file is missing, outside of `root`, of another format, too large, or damaged.
    """
    data = read_file(path, root, max_bytes, follow_links=follow_links)
    return decode(io.BytesIO(data), str(path), max_pixels=max_pixels, exif_orientation=exif_orientation)


def decode(file: IO[bytes], name: str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False) -> Image.Image:
    """Decode an open binary file as RGB.

    Args:
        file: A seekable binary file.
        name: The name of the image in error messages.
        max_pixels: The largest accepted product of width and height.
        exif_orientation: As for `open_image`.

    Returns:
        The first frame, mode RGB, fully decoded.

    Raises:
        ImageError: The file has none of `FORMATS`, is too large, or is damaged.
    """
    with _opened(file, name, max_pixels) as image:
        return to_rgb(upright(image) if exif_orientation else image, name, copy=False)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned and mirrored as its EXIF data says; an image without such data is returned as it is."""
    return ImageOps.exif_transpose(image)


_LYING = (5, 6, 7, 8)  # the EXIF orientations that swap width and height


@contextmanager
def _opened(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image lazily: read its header and check the limits, without allocating any pixel."""
    try:
        _check_scans(file, name)
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    name, f"{width}x{height} pixels exceed the limit of {max_pixels}", "shrink it, or raise max_pixels"
                )
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not one of {', '.join(FORMATS)}", "convert it, or download it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"decompression bomb ({error})", "shrink it, or drop the row") from error
    except Exception as error:  # decoders raise nearly anything on damaged input; a bad image must never end a run
        raise ImageError(name, f"damaged ({reason_of(error)})", "download it again") from error


def _check_scans(file: IO[bytes], name: str) -> None:
    """Refuse a JPEG with so many scans that decoding it would take minutes; the file is rewound to its beginning."""
    is_jpeg = file.read(3) == b"\xff\xd8\xff"
    file.seek(0)
    if not is_jpeg:
        return
    data = file.read()
    file.seek(0)
    place, num_scans, num_segments = 2, 0, 0
    while marker := _SEGMENT.search(data, place):
        place, kind = marker.end(), data[marker.end() - 1]
        if kind == _END:
            return
        num_scans += kind == _SCAN
        num_segments += 1
        if num_scans > MAX_SCANS:
            raise ImageError(name, f"a JPEG of more than {MAX_SCANS} scans", "save it again, or drop the row")
        if num_segments > _MAX_SEGMENTS:
            raise ImageError(name, f"a JPEG of more than {_MAX_SEGMENTS} segments", "save it again, or drop the row")
        place += max(2, int.from_bytes(data[place : place + 2]))


@dataclass(frozen=True)
class ImageFacts:
    """The facts about an image file that are known without decoding its pixels.

    Attributes:
        digest: BLAKE2 of the file's bytes, 32 hexadecimal digits.
        size: Width and height in pixels, from the header.
    """

    digest: str
    size: Size


def facts_of(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False) -> ImageFacts:
    """Compute the digest of an encoded image and read its header.

    Args:
        data: The whole file.
        name: The name of the image in error messages.
        max_pixels: The largest accepted product of width and height.
        exif_orientation: As for `open_image`; the size is then that of the turned image.

    Raises:
        ImageError: The header has none of `FORMATS`, states too many pixels, or is damaged.
    """
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        width, height = image.size
        lying = exif_orientation and image.getexif().get(ExifTags.Base.Orientation) in _LYING
        return ImageFacts(digest_of(data), (height, width) if lying else (width, height))


def digest_of(data: bytes) -> str:
    """Return the digest of a file's bytes, as in `ImageFacts`."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def image_digest(image: Image.Image) -> str:
    """Return a digest of an image's content.

    The digest covers mode and size as well as the pixels, since the raw bytes of a 2x8 and an 8x2 image may be the
    same. It covers the palette, since two palette images may differ in the palette alone.

    Args:
        image: Any PIL image.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    digest = hashlib.sha256(f"{image.mode}:{image.width}x{image.height}:".encode())
    if image.mode in ("P", "PA"):
        digest.update(repr((image.getpalette("RGBA"), image.info.get("transparency"))).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
