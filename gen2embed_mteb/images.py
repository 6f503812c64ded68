"""Opening images safely: explicit formats, size limits, RGB, and one error that says what to mend.

Benchmarks of this field carry hundreds of thousands of downloaded images, so this file assumes that some are broken
and that none is trusted: only the formats named here are decoded, a decompression bomb is refused before its pixels
are allocated, and every fault becomes an `ImageError` that the caller can count. Where images come from (a folder or
a zip archive, never outside of it) is `image_source.py`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from gen2embed_mteb.errors import Gen2EmbedError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The decoders that may run. Pillow knows some forty; the rest is attack surface that no benchmark needs."""

MAX_PIXELS = 89_478_485
"""The pixel count above which an image is refused (Pillow's own warning threshold, a quarter of a GiB of RGB)."""

MAX_ASPECT_RATIO = 200
"""The aspect ratio above which the Qwen processors raise (`smart_resize`)."""


Size = tuple[int, int]
"""Width and height of an image, in pixels."""


class ImageError(Gen2EmbedError):
    """An image that cannot be used; the message names the file, the fault and the remedy.

    Attributes:
        file: The image as the caller named it.
        reason: The fault alone, one line.
    """

    def __init__(self, file: str, reason: str, remedy: str) -> None:
        """Builds the message `image FILE: REASON; REMEDY`."""
        reason = one_line(ValueError(reason))  # a decoder's own error may hold a memory address
        super().__init__(f"image {file!r}: {reason}; {remedy}")
        self.file = file
        self.reason = reason
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str, str]]:
        """Keeps the error picklable, as errors cross process borders in data loaders."""
        return type(self), (self.file, self.reason, self.remedy)


def confined(path: str | Path, root: str | Path) -> Path:
    """Resolves `path` inside `root`, following links, and refuses whatever ends up elsewhere.

    Args:
        path: A path relative to `root`. An absolute path is accepted only when it lies inside `root`.
        root: The folder that must not be left.

    Returns:
        The resolved path of a regular file.

    Raises:
        ImageError: The path leaves `root` (through `..`, a link or by being absolute), does not exist or is no file.
    """
    name = str(path)
    base = Path(root).resolve()
    try:
        target = (base / path).resolve(strict=True)
    except FileNotFoundError as error:
        raise ImageError(
            name, f"not found in {str(root)!r}", "check --image_dir, or download the file again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # name too long, null byte, loop of links
        raise ImageError(name, f"unusable path ({error})", "correct the path in the data") from error
    if not target.is_relative_to(base):
        raise ImageError(name, f"leads outside of {str(root)!r}", "point --image_dir at the folder that holds it")
    # A named pipe or a device would block or never end.
    if not target.is_file():
        raise ImageError(name, "not a regular file", "correct the path in the data")
    return target


def open_image(path: str | Path, root: str | Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file as RGB.

    Args:
        path: The file; relative to `root` when that is given.
        root: If given, the file must resolve to somewhere inside this folder.
        max_pixels: The largest width x height accepted.

    Returns:
        The first frame, mode RGB, fully decoded. EXIF orientation is left as it is, as in VLM2Vec and Gen2Embed.

    Raises:
        ImageError: Missing, outside of `root`, of another format, too large, or damaged.
    """
    if root is not None:
        target = confined(path, root)
    else:
        target = Path(path)
        if not target.is_file():
            raise ImageError(str(path), "not found", "check the path")
    try:
        with target.open("rb") as file:
            return decode(file, str(path), max_pixels=max_pixels)
    except OSError as error:
        raise ImageError(str(path), f"cannot be read ({error})", "check its permissions") from error


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
    try:
        # Opening reads the header only: the size is known before a single pixel is allocated.
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    name, f"{width}x{height} pixels exceed the limit of {max_pixels}", "shrink it, or raise max_pixels"
                )
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, f"not one of {', '.join(FORMATS)}", "convert it, or download it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"decompression bomb ({error})", "shrink it, or drop the row") from error
    except Exception as error:  # decoders raise nearly anything on damaged input; a bad image must never end a run
        raise ImageError(name, f"damaged ({type(error).__name__}: {error})", "download it again") from error


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file without decoding its pixels.

    Attributes:
        digest: BLAKE2 of the file's bytes, 32 hexadecimal digits.
        size: Width and height in pixels, from the header.
    """

    digest: str
    size: Size


def facts_of(data: bytes, name: str) -> ImageFacts:
    """Digests an encoded image and reads its header.

    Args:
        data: The whole file.
        name: What to call the image in errors.

    Raises:
        ImageError: The header is of none of `FORMATS`, or damaged.
    """
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return ImageFacts(digest, image.size)
    except Exception as error:  # as in `decode`: whatever a damaged header makes a decoder raise
        raise ImageError(name, f"damaged ({type(error).__name__}: {error})", "download it again") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB as the reference client does (`.convert("RGB")`), in a copy that owns its pixels.

    Alpha is dropped, not blended. Two modes need a step in between: palettes whose transparency is a byte string
    (Pillow warns otherwise, the pixels are the same), and 16-bit grayscale, whose high byte is kept: Pillow's own
    conversion clips everything above 255 to white, which leaves nothing of the picture.
    """
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    rgb = image.convert("RGB")
    if rgb is image:  # `convert` returns the lazy file itself where the mode fits: load before the file closes
        rgb = image.copy()
    # A plain in-memory image: no file handle, no metadata that a processor could act upon.
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


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
