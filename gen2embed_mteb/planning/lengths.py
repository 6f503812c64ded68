"""The lengths of inputs in tokens and patches, from a model's processor alone.

An input is rendered and goes through the processor as it will in the run, with blank pictures of its pictures' sizes,
so that nothing is estimated but what the run changes later: texts that are cut to `--max_length` count as that many
tokens. The tokens that all inputs of a side begin with are left out, as bulk encoding runs them once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gen2embed_mteb.embedder.passes.shared_beginning import reuse_possible
from gen2embed_mteb.images.decoding import Size
from gen2embed_mteb.inspection.prompt_inspection import OpenedPrompt
from gen2embed_mteb.names import Side
from gen2embed_mteb.planning.costs import Lengths


class LengthCounter:
    """Counts tokens and patches.

    Args:
        opened: The processor and the prompt.
        max_length: The longest input in tokens; None for no limit.
    """

    def __init__(self, opened: OpenedPrompt, max_length: int | None = None) -> None:
        """Keep the arguments."""
        self._opened, self._max_length = opened, max_length
        self._shared: dict[Side, int] = {}

    def lengths(self, side: Side, text: str, sizes: Sequence[Size]) -> Lengths:
        """Return the lengths of one input.

        Args:
            side: Its side.
            text: Its text.
            sizes: The (width, height) of its pictures, after they were resized.
        """
        features = self._processed(self._opened.rendered(side, text, len(sizes)), sizes)
        length = len(_first_row(features["input_ids"]))
        if self._max_length is not None:
            length = min(length, self._max_length)
        return Lengths(max(1, length - self._shared_by(side)), self._patches(features, len(sizes)))

    def _processed(self, rendered: str, sizes: Sequence[Size]) -> Any:
        processor = self._opened.processor
        images = [Image.new("RGB", size) for size in sizes]
        given: dict[str, Any] = {"text": [rendered], "add_special_tokens": not self._begins(rendered)}
        return processor(**given, images=[images]) if images else processor(**given)

    def _begins(self, rendered: str) -> bool:
        """Return whether the template wrote the token that the tokenizer would put first."""
        first = self._opened.special_tokens.get("bos_token")
        return first is None or rendered.startswith(first)

    def _shared_by(self, side: Side) -> int:
        if side not in self._shared:
            shared = 0
            if reuse_possible(self._opened.config):
                one, other = (
                    _first_row(self._processed(self._opened.rendered(side, text, 0), ())["input_ids"])
                    for text in ("a", "b")
                )
                shared = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
            self._shared[side] = shared
        return self._shared[side]

    def _patches(self, features: Any, num_images: int) -> tuple[int, ...]:
        if not num_images:
            return ()
        if "image_grid_thw" in features:
            return tuple(math.prod(int(side) for side in row) for row in features["image_grid_thw"])
        pixels, tower = features["pixel_values"], self._opened.config.vision_config
        parts = pixels if isinstance(pixels, list) else [pixels]
        count = sum(math.prod(part.shape) for part in parts) // (3 * int(tower.patch_size) ** 2)
        return (count // num_images,) * num_images


def _first_row(ids: Any) -> list[int]:
    return [int(token) for token in ids[0]]
