"""Converting an image from any of Pillow's modes to RGB.

Most modes are converted as the reference client does. Modes that this would turn white or black are scaled by the range
of values that the file states.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from gen2embed_mteb.images.errors import ImageError, reason_of

_BITS_PER_SAMPLE, _LEAST_VALUE, _GREATEST_VALUE = 258, 340, 341  # tags of TIFF


def to_rgb(image: Image.Image, name: str = "<PIL image>", *, copy: bool = True) -> Image.Image:
    """Convert any mode to RGB as the reference client does (`.convert("RGB")`), in an image that owns its pixels.

    Alpha is dropped, not blended. Three modes need an additional step: palettes whose transparency is a byte string
    (otherwise Pillow warns; the pixels are the same); 16-bit grayscale, of which the high byte is kept, since Pillow
    would clip everything above 255 to white; and `I` and `F`, which are scaled by the range that the file states. If it
    states none, values in 0…255 are kept, and others are refused, since they would become white or black.

    Args:
        image: Any PIL image, loaded or not.
        name: The name of the image in error messages.
        copy: `False` takes the pixels over where the mode is RGB; the given image must not be used again.

    Returns:
        A plain image in memory, mode RGB, without an open file and without metadata that a processor could use (such
        as an orientation).

    Raises:
        ImageError: The image is closed, cut off or damaged, its mode has no colours, or the range of its values is
            unknown.
    """
    try:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")
        elif image.mode.startswith("I;16"):
            image = _high_byte(image)
        elif image.mode in ("I", "F"):
            image = _scaled(image, name)
        if image.mode == "RGB" and not copy and hasattr(image, "_new"):  # private: it may go
            image.load()
            rgb = image._new(image.im)
        else:
            rgb = image.convert("RGB")  # a copy, also where the mode fits
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged input
        raise ImageError(name, f"damaged ({reason_of(error)})", "download it again, or open it again") from error
    rgb.info = {}
    return rgb


def _high_byte(image: Image.Image) -> Image.Image:
    """Return the high byte of 16-bit samples, or the highest 8 of 12 bits if a TIFF states 12 bits per sample."""
    factor = 1 / 16 if _number(_tags(image).get(_BITS_PER_SAMPLE)) == 12 else 1 / 256
    return image.convert("I").point(lambda value: value * factor).convert("L")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Return an image of mode I or F, scaled to values in 0…255."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ImageError(name, f"mode {image.mode} with NaN or infinite values", "replace them, and convert it to L")
    if not values.size:
        return image
    lowest, highest = float(values.min()), float(values.max())
    least, greatest = _stated_range(image)
    if least <= lowest and highest <= greatest:
        share = (values.astype(np.float64) - least) / (greatest - least)
        return Image.fromarray(np.rint(share * 255).astype(np.uint8))
    # Floats of at most 1 may be an image with values in 0…1, or an almost black one; only all zeros are clearly black.
    unclear = image.mode == "F" and 0 < highest <= 1
    if lowest < 0 or highest > 255 or unclear or math.isfinite(least):
        raise ImageError(
            name,
            f"mode {image.mode} with values from {lowest:g} to {highest:g}, whose black and white nothing states",
            "scale it to 0…255, and convert it to mode L",
        )
    return image


def _stated_range(image: Image.Image) -> tuple[float, float]:
    """Return the values that a file states for black and white; NaN twice if it states none."""
    tags = _tags(image)
    ends = [_number(tags.get(tag)) for tag in (_LEAST_VALUE, _GREATEST_VALUE)]
    return (ends[0], ends[1]) if ends[0] < ends[1] else (math.nan, math.nan)


def _number(value: Any) -> float:
    value = value[0] if isinstance(value, tuple) and value else value
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
