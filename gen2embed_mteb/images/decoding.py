"""Opening images safely: explicit formats, size limits, RGB, and one error that says what to mend.

Benchmarks of this field carry hundreds of thousands of downloaded images, so this file assumes that some are broken
and that none is trusted: only the formats named here are decoded, a decompression bomb is refused before its pixels
are allocated or enlarged to, and every fault becomes an `ImageError` that the caller can count. Where images come from
(a folder or a zip archive, never outside of it) is `image_source.py`; how their files are read, `image_files.py`.
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
"""The decoders that may run. Pillow knows some forty; the rest is attack surface that no benchmark needs."""

MAX_PIXELS = 89_478_485
"""The pixel count above which an image is refused (Pillow's own warning threshold, a quarter of a GiB of RGB)."""

MAX_SCANS = 100
"""The scans a JPEG may have, each of which touches every pixel again (libtiff's limit; encoders write about ten)."""

_MAX_SEGMENTS = 100_000
# A marker of JPEG that is neither part of the pixels' data nor without a length.
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
        root: If given, the folder that the file must lie in; see `image_files.confined`.
        max_pixels: The largest width x height accepted.
        max_bytes: The largest file accepted.
        follow_links: Whether links in `root` may lead out of it.
        exif_orientation: Whether to turn the image as its EXIF data says; VLM2Vec and the official code do not.

    Returns:
        The first frame, mode RGB, fully decoded.

    Raises:
        ImageError: Missing, outside of `root`, of another format, too large, or damaged.
    """
    data = read_file(path, root, max_bytes, follow_links=follow_links)
    return decode(io.BytesIO(data), str(path), max_pixels=max_pixels, exif_orientation=exif_orientation)


def decode(file: IO[bytes], name: str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False) -> Image.Image:
    """Decode an open binary file as RGB.

    Args:
        file: A seekable binary file.
        name: What to call the image in errors.
        max_pixels: The largest width x height accepted.
        exif_orientation: As for `open_image`.

    Returns:
        The first frame, mode RGB, fully decoded.

    Raises:
        ImageError: Not one of `FORMATS`, too large, or damaged.
    """
    with _opened(file, name, max_pixels) as image:
        return to_rgb(upright(image) if exif_orientation else image, name)


def upright(image: Image.Image) -> Image.Image:
    """Return an image turned and mirrored as its EXIF data says; one without such data as it is."""
    return ImageOps.exif_transpose(image)


_LYING = (5, 6, 7, 8)  # the orientations of EXIF that swap width and height


@contextmanager
def _opened(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image lazily: its header is read and held to the limits, no pixel is allocated."""
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
    """Refuse a JPEG of so many scans that decoding it would take minutes; leaves the file at its beginning."""
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
    """What is known of an image file without decoding its pixels.

    Attributes:
        digest: BLAKE2 of the file's bytes, 32 hexadecimal digits.
        size: Width and height in pixels, from the header.
    """

    digest: str
    size: Size


def facts_of(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, exif_orientation: bool = False) -> ImageFacts:
    """Digest an encoded image and reads its header.

    Args:
        data: The whole file.
        name: What to call the image in errors.
        max_pixels: The largest width x height accepted.
        exif_orientation: As for `open_image`; the size is then that of the turned image.

    Raises:
        ImageError: The header is of none of `FORMATS`, too large, or damaged.
    """
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        width, height = image.size
        lying = exif_orientation and image.getexif().get(ExifTags.Base.Orientation) in _LYING
        return ImageFacts(digest, (height, width) if lying else (width, height))


def image_digest(image: Image.Image) -> str:
    """Return names an image by its content.

    Mode and size go in with the pixels: the raw bytes of a 2x8 and an 8x2 image are the same, and so are those of two
    palette images that differ in the palette alone.

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
