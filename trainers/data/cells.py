"""What a cell of training data can hold: one rule for tables, sampling files and trainers.

A cell is one of three things: a text (a string is always text); a dict with the keys that `Gen2Embed.encode` takes,
which are `text`, and `image` or `images` with one image or a list of them; or the dict `{"bytes", "path"}` in which
`datasets` stores an image. A key whose value is null counts as absent, since tables give all rows the same keys. Any
other key is refused, and the error names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gen2embed_mteb.embedder.preparation.inputs import INPUT_KEYS, STORED_IMAGE


class Cell(NamedTuple):
    """A cell's text, None if it has none, and its images as they were given."""

    text: str | None
    images: tuple[Any, ...]


def read_cell(cell: Mapping[str, Any]) -> Cell:
    """Return the text and the images of a cell that is a dict.

    Args:
        cell: The dict.

    Returns:
        Its text and its images; both may be missing. Entries that are null or an empty string do not count as images.

    Raises:
        TypeError: The dict has another key, both `image` and `images`, or a text that is not a string; the message
            names it.
    """
    given = {key: value for key, value in cell.items() if value is not None}
    if given and given.keys() <= STORED_IMAGE:
        return Cell(None, (dict(given),))
    if unknown := sorted(str(key) for key in given if key not in INPUT_KEYS):
        raise TypeError(
            f'unknown key {", ".join(map(repr, unknown))}; a cell is a text, {{"text", "image"}} (or "images") with '
            'either left out, or an image as {"bytes", "path"}'
        )
    if "image" in given and "images" in given:
        raise TypeError('both "image" and "images" are given; pass one of them')
    text, images = given.get("text"), given.get("image", given.get("images"))
    if text is not None and not isinstance(text, str):
        raise TypeError(f'"text" is {type(text).__name__}, not a string')
    listed = images if isinstance(images, list | tuple) else [images]
    return Cell(text, tuple(image for image in listed if image is not None and not _is_empty(image)))


def _is_empty(image: Any) -> bool:
    return isinstance(image, str) and not image


def stored_image(image: Mapping[str, Any]) -> bytes | str:
    """Return the content or the path of an image that `datasets` stored as a dict.

    Args:
        image: `{"bytes", "path"}`; either of them can be missing, null or empty.

    Returns:
        The image file's bytes if the dict has them, else its path.

    Raises:
        TypeError: The dict has another key, neither of the two, or one of another type; the message names it.
    """
    if unknown := sorted(str(key) for key in image if key not in STORED_IMAGE and image[key] is not None):
        raise TypeError(f'an image has the unknown key {", ".join(map(repr, unknown))}; it is {{"bytes", "path"}}')
    data, path = image.get("bytes"), image.get("path")
    if data is not None and not isinstance(data, bytes | bytearray):
        raise TypeError(f'"bytes" of an image is {type(data).__name__}, not bytes')
    if path is not None and not isinstance(path, str):
        raise TypeError(f'"path" of an image is {type(path).__name__}, not a string')
    if data:
        return bytes(data)
    if not path:
        raise TypeError("an image has neither bytes nor path")
    return path
