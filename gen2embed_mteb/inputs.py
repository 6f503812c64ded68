"""What users may pass to `Gen2Embed`, and how it becomes one conversation: a text, and images opened safely.

Accepted: a string (always text, never opened or fetched), a PIL image, a `pathlib.Path` to an image, a dict with "text"
and/or "image" (a PIL image, a path, or a list of them), and a chat conversation as sentence-transformers knows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images import open_image, resize, to_rgb

_MARKER = re.compile(r"<\|image_([1-9])\|>")


@dataclass(frozen=True)
class Content:
    """One input, opened: the user's text with MMEB's image markers, its RGB images, and a system prompt if given."""

    text: str
    images: tuple[Image.Image, ...] = ()
    system: str | None = None

    def as_messages(self) -> list[dict[str, Any]]:
        """The conversation, images first, as chat templates read it."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        if self.text:
            parts.append({"type": "text", "text": self.text})
        user = {"role": "user", "content": parts}
        if self.system is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, user]


def content_of(sample: Any, image_root: str | Path | None = None, resize_policy: str = "processor") -> Content:
    """Open one input.

    Args:
        sample: what the user passed; see the module's docstring.
        image_root: folder that image paths are relative to and may not leave; `None` takes paths as they are.
        resize_policy: a name of `images.RESIZE_POLICIES`.

    Raises:
        TypeError: the input is of another type, or a dict with other keys.
        ValueError: a dict with neither text nor image.
        ImageError: an image cannot be opened.
    """
    if isinstance(sample, Content):
        return sample
    if isinstance(sample, str):
        return Content(sample)
    if isinstance(sample, (Image.Image, Path)):
        sample = {"image": sample}
    if isinstance(sample, list) or (isinstance(sample, dict) and "role" in sample):
        return _conversation(sample, image_root, resize_policy)
    if not isinstance(sample, dict) or not sample.keys() <= {"text", "image", "images"}:
        shown = f"a dict with keys {sorted(map(str, sample))}" if isinstance(sample, dict) else type(sample).__name__
        raise TypeError(
            f'cannot encode {shown}: pass a str, a PIL image, a pathlib.Path, or {{"text": …, "image": …}} '
            "with either key left out"
        )
    text, images = sample.get("text"), sample.get("image") or sample.get("images")
    if text is not None and not isinstance(text, str):
        raise TypeError(f'"text" must be a str, got {type(text).__name__}: {text!r}')
    given = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    opened = [_open(image, image_root, resize_policy) for image in given if image is not None and image != ""]
    if text is None and not opened:
        raise Gen2EmbedError(f'nothing to encode in {sample!r}: give "text", "image" or both')
    return Content(text or "", tuple(_in_marked_order(text or "", opened)))


def _conversation(sample: Any, image_root: str | Path | None, resize_policy: str) -> Content:
    """A chat conversation; its user turns are joined, as the templates do."""
    system: str | None = None
    text, images = "", []
    for message in sample if isinstance(sample, list) else [sample]:
        if not isinstance(message, dict) or "content" not in message:
            raise TypeError(f"cannot encode {message!r}: a list is a conversation of role/content messages")
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                images.append(_open(part.get("image"), image_root, resize_policy))
            elif kind == "text" and message.get("role") == "system":
                system = (system or "") + str(part.get("text", ""))
            elif kind == "text":
                text += str(part.get("text", ""))
            else:
                raise TypeError(f'cannot encode {part!r}: a part is {{"type": "text", "text": …}} or "image" likewise')
    return Content(text, tuple(images), system)


def _open(image: Any, image_root: str | Path | None, resize_policy: str) -> Image.Image:
    if isinstance(image, (str, Path)):
        image = open_image(image, image_root)
    elif isinstance(image, Image.Image):
        image = to_rgb(image) if image.mode != "RGB" else image
    else:
        raise TypeError(f'"image" must be a PIL image or a path, got {type(image).__name__}')
    return resize(image, resize_policy)


def _in_marked_order(text: str, images: list[Image.Image]) -> list[Image.Image]:
    """Images in the order in which the text's numbered markers name them, the unnamed ones last."""
    named = [int(number) - 1 for number in dict.fromkeys(_MARKER.findall(text)) if int(number) <= len(images)]
    return [images[index] for index in [*named, *(i for i in range(len(images)) if i not in named)]]
