"""Resizing an image for the model's processor: one rule for every input, on images and on sizes alone.

`fitted` resizes an image by a policy and then enlarges it if it is too small for a patch-based processor. `fitted_size`
computes the resulting size without any pixels, so that lengths in tokens are known before an image is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.decoding import MAX_PIXELS, Size
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.options import OrientationOption

MAX_ASPECT_RATIO = 200
"""The aspect ratio above which the Qwen processors raise an error (`smart_resize`)."""

MIN_SIDE = 28
"""The side of a merged patch of the Qwen processors in pixels; they raise an error if a side is shorter."""


def ensure_min_side(image: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """Enlarge an image until a patch-based processor accepts it; see `min_side_size`.

    Args:
        image: Any PIL image.
        min_side: The smallest side in pixels; 0 switches enlarging off.

    Returns:
        The same image, or an enlarged one (bicubic).

    Raises:
        ValueError: `min_side` is negative.
    """
    size = min_side_size(image.size, min_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def min_side_size(size: Size, min_side: int = MIN_SIDE) -> Size:
    """Return the size to which `ensure_min_side` enlarges an image.

    Qwen's processors raise an error if a side is shorter than one merged patch (28 pixels; 32 in Qwen3-VL) or if the
    sides differ by more than 200 to 1. Both occur in MMEB. The shorter side is first stretched to a 200th of the
    longer; then the whole image is scaled up in proportion until the shorter side reaches `min_side`.

    Args:
        size: Width and height in pixels.
        min_side: The smallest side in pixels; 0 switches enlarging off.

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
        # Integer arithmetic, rounded to the nearest: the shorter side becomes exactly min_side.
        width, height = ((2 * side * min_side + short) // (2 * short) for side in (width, height))
    return width, height


def _official_size(size: Size) -> Size:
    """Return the size at inference of the official Gen2Embed code.

    The shorter side is at least half the longer; the longer is at most 992, and the shorter at least 336.
    """
    width: float
    height: float
    width, height = size
    if max(width, height) > 2 * min(width, height):
        width, height = (width, width / 2) if width > height else (height / 2, height)
    scale = 1.0
    if max(width, height) > 992:
        scale = 992 / max(width, height)
    if min(width, height) < 336:  # this rule overrides the one above
        scale = 336 / min(width, height)
    return int(width * scale), int(height * scale)


RESIZE_POLICIES: dict[str, Callable[[Size], Size]] = {
    "processor": lambda size: size,
    "official": _official_size,
    "square-448": lambda _: (448, 448),
}
"""The policies by which images are resized before the model's processor: `processor` (default) leaves all resizing to
the processor, as MMEB's V2 loader does; `official` is Gen2Embed's rule at inference; `square-448` its rule in training.
"""


def resize(image: Image.Image, policy: str = "processor") -> Image.Image:
    """Resize an image by a policy: `official` uses Lanczos, as the official code does, the others are bicubic.

    Args:
        image: Any PIL image.
        policy: A key of `RESIZE_POLICIES`.

    Returns:
        The resized image; with `processor` the same image.

    Raises:
        ValueError: The policy is unknown; the message lists the known ones.
    """
    size = resized_size(image.size, policy)
    if policy == "processor":
        return image
    return image.resize(size, Image.Resampling.LANCZOS if policy == "official" else Image.Resampling.BICUBIC)


def resized_size(size: Size, policy: str = "processor") -> Size:
    """Return the size to which `resize` brings an image.

    Args:
        size: Width and height in pixels.
        policy: A key of `RESIZE_POLICIES`.

    Raises:
        ValueError: The policy is unknown; the message lists the known ones.
    """
    if policy not in RESIZE_POLICIES:
        raise Gen2EmbedError(f"unknown resize policy {policy!r}; known: {', '.join(RESIZE_POLICIES)}")
    return RESIZE_POLICIES[policy](size)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(OrientationOption):
    """The options for resizing and turning an image before the processor, the same in every command and library.

    Raises:
        Gen2EmbedError: The policy is unknown, or `min_side` is negative.
    """

    resize: str = option(
        "how images are resized before the processor", default="processor", choices=tuple(RESIZE_POLICIES)
    )
    min_side: int = option(
        "least image side in pixels; smaller images are enlarged; 0: never", default=MIN_SIDE, least=0
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)

    def image_options(self) -> ImageOptions:
        """Return these options alone, where they are part of a larger configuration."""
        return ImageOptions(**{field.name: getattr(self, field.name) for field in fields(ImageOptions)})


def fitted(image: Image.Image, options: ImageOptions, name: str = "<PIL image>") -> Image.Image:
    """Resize an image for the processor; all inputs go through this function, wherever they come from.

    Args:
        image: An RGB image.
        options: The policy, which is applied first, and the smallest side, which is applied last; see
            `ensure_min_side`. The orientation is applied when a file is opened (`decoding.decode`), since its EXIF data
            is dropped there.
        name: The name of the image in error messages.

    Raises:
        ImageError: The image would have to be enlarged beyond `MAX_PIXELS`.
    """
    fitted_size(image.size, options, name)
    return ensure_min_side(resize(image, options.resize), options.min_side)


def fitted_size(size: Size, options: ImageOptions, name: str = "<PIL image>") -> Size:
    """Return the size to which `fitted` brings an image of a size; other arguments and errors are those of `fitted`."""
    width, height = min_side_size(resized_size(size, options.resize), options.min_side)
    if width * height > max(MAX_PIXELS, size[0] * size[1]):
        raise ImageError(
            name,
            f"{size[0]}x{size[1]} pixels, which must be enlarged to {width}x{height}, more than {MAX_PIXELS}",
            "cut it into pieces, or drop the row",
        )
    return width, height
