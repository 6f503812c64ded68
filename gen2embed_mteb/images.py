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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.image_errors import ImageError, reason_of
from gen2embed_mteb.image_files import MAX_FILE_BYTES, read_file
from gen2embed_mteb.image_modes import to_rgb

__all__ = [
    "FORMATS",
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "MAX_SCANS",
    "RESIZE_POLICIES",
    "ImageError",
    "ImageFacts",
    "Size",
    "decode",
    "ensure_min_side",
    "facts_of",
    "fitted",
    "fitted_size",
    "image_digest",
    "min_side_size",
    "open_image",
    "resize",
    "resized_size",
    "to_rgb",
]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The decoders that may run. Pillow knows some forty; the rest is attack surface that no benchmark needs."""

MAX_PIXELS = 89_478_485
"""The pixel count above which an image is refused (Pillow's own warning threshold, a quarter of a GiB of RGB)."""

MAX_ASPECT_RATIO = 200
"""The aspect ratio above which the Qwen processors raise (`smart_resize`)."""

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
) -> Image.Image:
    """Opens an image file as RGB.

    Args:
        path: The file; relative to `root` when that is given.
        root: If given, the folder that the file must lie in; see `image_files.confined`.
        max_pixels: The largest width x height accepted.
        max_bytes: The largest file accepted.
        follow_links: Whether links in `root` may lead out of it.

    Returns:
        The first frame, mode RGB, fully decoded. EXIF orientation is left as it is, as in VLM2Vec and Gen2Embed.

    Raises:
        ImageError: Missing, outside of `root`, of another format, too large, or damaged.
    """
    data = read_file(path, root, max_bytes, follow_links=follow_links)
    return decode(io.BytesIO(data), str(path), max_pixels=max_pixels)


def decode(file: IO[bytes], name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an open binary file as RGB.

    Args:
        file: A seekable binary file.
        name: What to call the image in errors.
        max_pixels: The largest width x height accepted.

    Returns:
        The first frame, mode RGB, fully decoded.

    Raises:
        ImageError: Not one of `FORMATS`, too large, or damaged.
    """
    with _opened(file, name, max_pixels) as image:
        return to_rgb(image, name)


@contextmanager
def _opened(file: IO[bytes], name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Opens an image lazily: its header is read and held to the limits, no pixel is allocated."""
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
    """Refuses a JPEG of so many scans that decoding it would take minutes; leaves the file at its beginning."""
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


def facts_of(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Digests an encoded image and reads its header.

    Args:
        data: The whole file.
        name: What to call the image in errors.
        max_pixels: The largest width x height accepted.

    Raises:
        ImageError: The header is of none of `FORMATS`, too large, or damaged.
    """
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        return ImageFacts(digest, image.size)


def ensure_min_side(image: Image.Image, min_side: int = 28) -> Image.Image:
    """Enlarges an image until a patch-based processor accepts it; see `min_side_size`.

    Args:
        image: Any PIL image.
        min_side: The least side in pixels; 0 switches the guard off.

    Returns:
        The same image, or an enlarged one (bicubic).

    Raises:
        ValueError: `min_side` is negative.
    """
    size = min_side_size(image.size, min_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def min_side_size(size: Size, min_side: int = 28) -> Size:
    """The size to which `ensure_min_side` enlarges an image.

    Qwen's processors raise when a side is shorter than one merged patch (28 pixels; 32 in Qwen3-VL) or when the sides
    differ by more than 200 to 1. Both occur in MMEB. The shorter side is first stretched to a 200th of the longer,
    then the whole is scaled up in proportion until the shorter side reaches `min_side`.

    Args:
        size: Width and height in pixels.
        min_side: The least side in pixels; 0 switches the guard off.

    Raises:
        ValueError: `min_side` is negative.
    """
    if min_side < 0:
        raise Gen2EmbedError(f"min_side is {min_side}; pass a number of pixels, or 0 to switch the guard off")
    if min_side == 0:
        return size
    least = -(-max(size) // MAX_ASPECT_RATIO)
    width, height = (max(side, least) for side in size)
    short = min(width, height)
    if short < min_side:
        # Integer arithmetic, rounded to the nearest: the shorter side lands on min_side exactly.
        width, height = ((2 * side * min_side + short) // (2 * short) for side in (width, height))
    return width, height


def _official_size(size: Size) -> Size:
    """Inference sizes of the official Gen2Embed code (method: shorter side at least half the longer, 336 to 992)."""
    width: float
    height: float
    width, height = size
    if max(width, height) > 2 * min(width, height):
        width, height = (width, width / 2) if width > height else (height / 2, height)
    scale = 1.0
    if max(width, height) > 992:
        scale = 992 / max(width, height)
    if min(width, height) < 336:  # the second rule wins
        scale = 336 / min(width, height)
    return int(width * scale), int(height * scale)


RESIZE_POLICIES: dict[str, Callable[[Size], Size]] = {
    "processor": lambda size: size,
    "official": _official_size,
    "square-448": lambda _: (448, 448),
}
"""How images are resized before the model's processor sees them: `processor` (default) leaves all to the processor,
as MMEB's V2 loader does; `official` is Gen2Embed's rule at inference; `square-448` its rule in training."""


def resize(image: Image.Image, policy: str = "processor") -> Image.Image:
    """Applies a resize policy by name: `official` with Lanczos, as the official code, the others bicubic.

    Args:
        image: Any PIL image.
        policy: A key of `RESIZE_POLICIES`.

    Returns:
        The resized image; `processor` returns it as it is.

    Raises:
        ValueError: The policy is unknown; the message lists the known ones.
    """
    size = resized_size(image.size, policy)
    if policy == "processor":
        return image
    return image.resize(size, Image.Resampling.LANCZOS if policy == "official" else Image.Resampling.BICUBIC)


def resized_size(size: Size, policy: str = "processor") -> Size:
    """The size to which `resize` brings an image.

    Args:
        size: Width and height in pixels.
        policy: A key of `RESIZE_POLICIES`.

    Raises:
        ValueError: The policy is unknown; the message lists the known ones.
    """
    if policy not in RESIZE_POLICIES:
        raise Gen2EmbedError(f"unknown resize policy {policy!r}; known: {', '.join(RESIZE_POLICIES)}")
    return RESIZE_POLICIES[policy](size)


def fitted(image: Image.Image, policy: str, min_side: int, name: str = "<PIL image>") -> Image.Image:
    """Brings an image to the size in which the processor gets it: the one rule for all inputs, wherever they come from.

    Args:
        image: Any PIL image.
        policy: A key of `RESIZE_POLICIES`, applied first.
        min_side: The least side in pixels, reached last; see `ensure_min_side`.
        name: What to call the image in errors.

    Raises:
        ImageError: It would have to be enlarged beyond `MAX_PIXELS`.
        ValueError: The policy is unknown, or `min_side` negative.
    """
    fitted_size(image.size, policy, min_side, name)
    return ensure_min_side(resize(image, policy), min_side)


def fitted_size(size: Size, policy: str, min_side: int, name: str = "<PIL image>") -> Size:
    """The size to which `fitted` brings an image; same arguments and errors."""
    width, height = min_side_size(resized_size(size, policy), min_side)
    if width * height > max(MAX_PIXELS, size[0] * size[1]):
        raise ImageError(
            name,
            f"{size[0]}x{size[1]} pixels, which must be enlarged to {width}x{height}, more than {MAX_PIXELS}",
            "cut it into pieces, or drop the row",
        )
    return width, height


def image_digest(image: Image.Image) -> str:
    """Names an image by its content.

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
