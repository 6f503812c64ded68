"""The fixed inputs of every kind that are sent to another program and encoded by the local model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from gen2embed_mteb.names import Side

SIDES: tuple[Side, Side] = ("query", "document")

_WORDS = (
    "the",
    "red",
    "boat",
    "near",
    "a",
    "small",
    "green",
    "island",
    "under",
    "two",
    "white",
    "birds",
    "and",
    "slow",
)
_UNICODE = "Grüße, 東京の夜景 — ¿qué tal? Ünïcödé 🚲 naïve"


@dataclass(frozen=True)
class Sample:
    """One input.

    Attributes:
        kind: What it consists of.
        text: Its text; may be empty.
        images: Its images.
    """

    kind: str
    text: str = ""
    images: tuple[Image.Image, ...] = ()

    def as_input(self) -> dict[str, object]:
        """Return it as `encode_query` and `encode_document` take it."""
        return {"text": self.text, "image": list(self.images)} if self.images else {"text": self.text}


def samples(*, with_images: bool) -> list[Sample]:
    """Return the inputs; they are the same in every call.

    Args:
        with_images: Whether the model takes images; without them the kinds with images are left out.
    """
    found = [
        Sample("text", "a red circle"),
        Sample("text", "Which of these reports speaks of the harbour?\nName the page."),
        Sample("unicode text", _UNICODE),
        Sample("long text", " ".join(_WORDS[number * 5 % len(_WORDS)] for number in range(150))),
        Sample("empty text"),
    ]
    if with_images:
        wide, tall, square = _picture(0, (150, 100)), _picture(1, (84, 140)), _picture(2, (112, 112))
        found += [
            Sample("image", images=(wide,)),
            Sample("image", images=(square,)),
            Sample("image and text", "the same, but blue\n", (tall,)),
            Sample("image inside text", "Before it <|image_1|> and behind it", (square,)),
            Sample("two images", "What has changed?", (square, tall)),
        ]
    return found


def _picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Draw a picture of soft colours with some noise; no side is so small that it would be enlarged."""
    random = np.random.default_rng(seed)
    width, height = size
    slopes = random.uniform(-1, 1, (2, 3))
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    soft = 128 + 90 * (down[..., None] * slopes[0] + across[..., None] * slopes[1])
    return Image.fromarray(np.clip(soft + random.normal(0, 12, soft.shape), 0, 255).astype(np.uint8))
