"""The inputs that users may pass to `Gen2Embed`, and their conversion to one conversation: a text and opened images.

Accepted are a string (always text, never opened or fetched), a PIL image, a `pathlib.Path` to an image, a dict with
"text" and/or "image" (or "images"), and a chat conversation as sentence-transformers knows it. An image in a dict is a
PIL image, a path, `{"bytes", "path"}` as `datasets` stores it, or a list of these. An image that is passed alone may
also have the form `{"bytes", "path"}`. A key whose value is `None` counts as absent, whatever its name.
Anything else (a number, NaN, an array, a tensor, pandas' NA) raises a `TypeError` at once.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import decode, open_image, upright
from gen2embed_mteb.images.errors import ImageError, short_name
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.modes import to_rgb
from gen2embed_mteb.images.resizing import ImageOptions, fitted
from gen2embed_mteb.images.source import ImageSource

INPUT_KEYS = frozenset({"text", "image", "images"})
"""The keys that an input dict may have."""
STORED_IMAGE = frozenset({"bytes", "path"})
"""The keys of an image as `datasets` stores it."""

_MARKER = re.compile(r"<\|image_([1-9])\|>")
_IMAGE_TOKENS = 256  # a guess, for sorting
_Open = Callable[[Any], Image.Image]


@dataclass(frozen=True)
class Content:
    """One opened input: the user's text with MMEB's image markers, its RGB images, and a system prompt if given."""

    text: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the conversation in the form that chat templates read, images first."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if self.text:
            parts.append({"type": "text", "text": self.text})
        user = {"role": "user", "content": parts}
        if self.system is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, user]


def content_of(
    sample: Any,
    image_root: str | Path | None = None,
    options: ImageOptions | None = None,
    *,
    source: ImageSource | None = None,
) -> Content:
    """Open one input.

    Args:
        sample: The user's input; see the module's docstring. A `Content` is returned as it is.
        image_root: Folder that image paths are relative to and may not leave; `None` takes paths as they are.
        options: How images are brought to the size that the processor gets; `None` means the defaults.
        source: Where images with a path are, in place of `image_root`.

    Raises:
        TypeError: The input is of another type, or it is a dict with other keys.
        ValueError: The input is a dict with neither text nor image, or an empty conversation.
        ImageError: An image cannot be opened, or would have to be enlarged beyond the limit.
    """
    options = options or ImageOptions()

    def opened(image: Any) -> Image.Image:
        name, image = _opened(image, image_root, source, exif_orientation=options.exif_orientation)
        return fitted(image, options, name)

    if isinstance(sample, Content):
        return sample
    if isinstance(sample, str):
        return Content(sample)
    if isinstance(sample, list) or (isinstance(sample, dict) and "role" in sample):
        return _conversation(sample, opened)
    given = sample
    if isinstance(sample, dict):  # all rows of a table have the same keys; one that a row does not use holds null
        given = {key: value for key, value in sample.items() if value is not None}
    if isinstance(given, (Image.Image, Path)) or _is_stored(given):
        given = {"image": given}
    if not isinstance(given, dict) or not given.keys() <= INPUT_KEYS:
        raise _not_an_input(sample)
    text, images = text_of(given.get("text"), '"text"'), _listed(given)
    if "text" not in given and not images:
        raise Gen2EmbedError(f'nothing to encode in {described(sample)}: give "text", "image" or both')
    return Content(text, tuple(_in_marked_order(text, [opened(image) for image in images])))


def text_of(value: Any, name: str) -> str:
    """Return a text that may be missing.

    Args:
        value: A string, or `None`, which stands for the empty text.
        name: The name of the value in the error message.

    Raises:
        TypeError: The value is anything else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {described(value)}")
    return value


def described(value: Any) -> str:
    """Return the description of a value in error messages: its type, and the value itself if that is short."""
    kind = type(value)
    if kind in (bool, float) or (kind is int and abs(value) < 10**12):
        return f"{kind.__name__}: {value}"
    if isinstance(value, dict):
        return f"a dict with keys {sorted(short_name(str(key)) for key in value)[:10]}"
    module = kind.__module__.partition(".")[0]
    return kind.__name__ if module == "builtins" else f"{module}.{kind.__name__}"


def rough_length(sample: Any) -> int:
    """Return roughly the number of tokens of an input, as a key to sort by.

    No image is opened, so all images count alike. A value that is not a valid input counts as 0.
    """
    if isinstance(sample, (Image.Image, Path)):
        return _IMAGE_TOKENS
    if isinstance(sample, Content):
        return len(sample.text) // 4 + _IMAGE_TOKENS * len(sample.images)
    if isinstance(sample, dict) and "role" not in sample:
        num_images = sum(len(_as_list(sample.get(key))) for key in ("image", "images"))
        return _text_length(sample.get("text")) + _IMAGE_TOKENS * (num_images + _is_stored(sample))
    if not isinstance(sample, (list, dict)):
        return _text_length(sample)
    length = 0
    for message in sample if isinstance(sample, list) else [sample]:
        content = message.get("content") if isinstance(message, dict) else None
        length += _text_length(content)
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                length += _text_length(part.get("text")) + _IMAGE_TOKENS * ("image" in part)
    return length


def _text_length(text: Any) -> int:
    return len(text) // 4 if isinstance(text, str) else 0


def _not_an_input(value: Any) -> TypeError:
    return TypeError(
        f'cannot encode {described(value)}: pass a str, a PIL image, a pathlib.Path, or {{"text": …, "image": …}} '
        "with either key left out"
    )


def _is_stored(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and value.keys() <= STORED_IMAGE


def _as_list(images: Any) -> list[Any]:
    """Return the images in a cell of a table; `None` and an empty path, which mean "no image", are left out."""
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    return [image for image in given if image is not None and not (isinstance(image, str) and image == "")]


def _listed(sample: Mapping[str, Any]) -> list[Any]:
    """Return the images of a dict, under either key, after checking the type of each."""
    first, second = _as_list(sample.get("image")), _as_list(sample.get("images"))
    if first and second:
        raise TypeError('cannot encode a dict with both "image" and "images": put all images under one of them')
    for image in first or second:
        if not isinstance(image, (str, Path, Image.Image)) and not _is_stored(image):
            raise _not_an_image(image)
    return first or second


def _not_an_image(value: Any) -> TypeError:
    return TypeError(
        f'"image" must be a PIL image or a path, got {described(value)} '
        '(also {"bytes", "path"} as datasets stores it, or a list of these)'
    )


def _conversation(sample: Any, opened: _Open) -> Content:
    """Return the content of a chat conversation; its user turns are joined, as the templates join them."""
    system: str | None = None
    text, images = "", []
    messages = sample if isinstance(sample, list) else [sample]
    if not messages:
        raise Gen2EmbedError("nothing to encode in an empty list: a list is a conversation of role/content messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
            shown = described(message)
            raise TypeError(
                f"cannot encode a list of {shown}: a list is a conversation of messages, "
                '{"role": str, "content": str or list of parts}'
            )
        role, parts = text_of(message.get("role"), '"role"'), message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind == "image":
                images += [opened(image) for image in _listed({"image": [_required(part.get("image"))]})]
            elif isinstance(kind, str) and kind == "text":
                said = text_of(part.get("text"), '"text"')
                if role == "system":
                    system = (system or "") + said
                else:
                    text += said
            else:
                raise TypeError(
                    f'cannot encode {described(part)} in a message: a part is {{"type": "text", "text": str}} '
                    'or {"type": "image", "image": PIL image or path}'
                )
    return Content(text, tuple(images), system)


def _required(image: Any) -> Any:
    if not _as_list(image):
        raise _not_an_image(image)
    return image


def _opened(
    image: Any, image_root: str | Path | None, source: ImageSource | None, *, exif_orientation: bool
) -> tuple[str, Image.Image]:
    """Return the name of an image, and the image in mode RGB."""
    if isinstance(image, Image.Image):
        return "<PIL image>", _rgb(upright(image) if exif_orientation else image)
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        if data is not None and not isinstance(data, bytes | bytearray):
            raise TypeError(f'"bytes" must be the bytes of an image file, got {described(data)}')
        name = text_of(None if isinstance(path, Path) else path, '"path"') or f"of {len(data or b'')} bytes in the data"
        if data:
            return name, decode(io.BytesIO(data), name, exif_orientation=exif_orientation)
        image = path
    if image is None or image == "":
        raise ImageError("", "neither bytes nor a path", "drop the row")
    name = str(image)
    return name, source.open(name) if source is not None else open_image(
        image, image_root, follow_links=follows_links(), exif_orientation=exif_orientation
    )


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image in mode RGB; without a copy where it is as `to_rgb` makes it, as all images that we opened."""
    plain = type(image) is Image.Image and image.mode == "RGB" and not image.info and not getattr(image, "_exif", None)
    with contextlib.suppress(ValueError):  # it was closed: `to_rgb` says so
        if plain and image.load() is not None:
            return image
    return to_rgb(image)


def _in_marked_order(text: str, images: list[Image.Image]) -> list[Image.Image]:
    """Return images in the order in which the text's numbered markers name them, the unnamed ones last."""
    named = [int(number) - 1 for number in dict.fromkeys(_MARKER.findall(text)) if int(number) <= len(images)]
    return [images[index] for index in [*named, *(i for i in range(len(images)) if i not in named)]]
