"""Fitting an input into `max_length`: the user's text is cut and images are reduced, but never the prompt.

sentence-transformers truncates the rendered conversation, which would lose the representation and generation prompts,
or cut through image tokens. Here the text is cut before it is rendered, so that the rendered conversation fits.

Cost: most inputs are recognised as short enough by the number of their bytes, without being tokenized. Only an input
that may be too long is rendered and tokenized, a few times more.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from gen2embed_mteb.embedder.preparation.image_tokens import PROBES, ImageTokens, Renderer
from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import Size
from gen2embed_mteb.images.resizing import min_side_size

logger = logging.getLogger(__name__)

_MARKERS = re.compile(r"(<\|image_[1-9]\|>)")
_SLACK = 8
FLOOR = 28
"""Images are not reduced further when their longer side has this many pixels: families that enlarge small images (Gemma
4, SmolVLM) make hardly fewer tokens of them, and nothing can be seen on smaller ones."""
_TEXT_SHARE = 4  # when images must be reduced, one quarter of the tokens beside the prompt is kept for text


class Fitter:
    """Cuts inputs to a number of tokens.

    Args:
        renderer: Renders conversations with the model's processor, for the side of the inputs.
        system: The caller's prompt, for `count_all`; a `Content` that is fitted names its own.
    """

    def __init__(self, renderer: Renderer, system: str | None = None) -> None:
        """Keep the renderer; nothing is computed yet."""
        self._system = system
        self._renderer, self._tokenizer = renderer, renderer.tokenizer
        self._images = ImageTokens(renderer)
        self._prompts: dict[tuple[int, str | None], int] = {}
        self._surroundings: dict[tuple[bool, int], int] = {}

    def image_tokens(self, images: Sequence[Image.Image]) -> int:
        """Return the number of tokens that the images of one input become.

        Raises:
            Gen2EmbedError: The processor cannot take these images; see `ImageTokens.total`.
        """
        return self._images.total([image.size for image in images])

    def count_all(self, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the number of tokens of many inputs, without rendering them.

        A number may be wrong by a token or two where text and prompt merge, and too large where the template removes
        blanks around the text.

        Args:
            texts: n texts.
            image_sizes: For each text, the sizes of its images.
        """
        bare = self._plain([_MARKERS.sub("", text) for text in texts])["input_ids"] if texts else []
        return [
            len(ids) + tokens + self._around(bool(ids), len(sizes))
            for ids, sizes, tokens in zip(bare, image_sizes, self._images.totals(image_sizes), strict=True)
        ]

    def _around(self, has_text: bool, num_images: int) -> int:
        """Return the number of tokens that stand around the text and the images of an input."""
        case = (has_text, num_images)
        if case not in self._surroundings:
            content = Content("", (Image.new("RGB", PROBES[0]),) * num_images, self._system)
            try:
                around = self._prompt_tokens(content)
                if has_text:
                    one = replace(content, text="a")
                    beside = self.count(one) - self.image_tokens(one.images) - self._text_tokens("a")
                    # Some templates write something beside a text only. A token or two are those that merge.
                    around = beside if abs(beside - around) > 2 else around
            except Gen2EmbedError:  # so many images are refused, which is reported when the input is prepared
                if num_images == 0:
                    raise
                around = self._around(has_text, 0)
            self._surroundings[case] = around
        return self._surroundings[case]

    def count(self, content: Content) -> int:
        """Return the number of tokens that reach the model for this input.

        Raises:
            Gen2EmbedError: The processor cannot take these images.
        """
        tokens = self.image_tokens(content.images)
        if content.images and not self._images.exact:
            return len(self._renderer.real(content))
        return len(self._renderer.rendered(content)) + self._images.added - len(content.images) + tokens

    def fit(self, content: Content, max_length: int) -> Content:
        """Cut the text, and reduce the images if they alone are too large, until `count` is at most `max_length`.

        Raises:
            ValueError: The prompt alone, or the smallest version of the images, does not fit.
        """
        # No token is shorter than a byte, and Unicode normalisation turns one byte into at most three: most inputs can
        # be seen to fit without being tokenized. The slack is for the prompt, whose tokens change next to the text.
        bound = 3 * len(content.text.encode(errors="replace")) + self.image_tokens(content.images) + _SLACK
        if bound + self._prompt_tokens(content) <= max_length or self.count(content) <= max_length:
            return content
        room = max_length - self._prompt_tokens(content)
        if room < 0:
            raise Gen2EmbedError(
                f"max_length={max_length} is too short: the prompt alone takes {max_length - room} tokens. "
                "Raise max_length."
            )
        images = content.images
        if self.image_tokens(images) > room:
            text = self._text_tokens(content.text)
            images = self._reduced(images, room - min(text, room // _TEXT_SHARE), room, max_length)
        content = replace(content, images=images)
        best = self._longest(content, room - self.image_tokens(images), max_length)
        return self._without_text(content, max_length) if best is None else best

    def _longest(self, content: Content, num_tokens: int, max_length: int) -> Content | None:
        """Return the content with as much of its text as fits; `None` if not even an empty text fits.

        The number of the text's own tokens is only a first guess, as tokens merge where the text meets the prompt.
        """
        num_tokens = max(num_tokens, 0)
        cut = replace(content, text=self._cut(content.text, num_tokens))
        while (excess := self.count(cut) - max_length) > 0:
            if num_tokens == 0:
                return None
            num_tokens = max(num_tokens - excess, 0)
            cut = replace(content, text=self._cut(content.text, num_tokens))
        for more in range(1, _SLACK):
            longer = replace(content, text=self._cut(content.text, num_tokens + more))
            if longer.text == content.text or self.count(longer) > max_length:
                break
            cut = longer
        return cut

    def _without_text(self, content: Content, max_length: int) -> Content:
        bare = replace(content, text="")
        if self.count(bare) > max_length:
            raise Gen2EmbedError(
                f"max_length={max_length} is too short: prompt and images alone take {self.count(bare)} tokens. "
                "Raise max_length."
            )
        return bare

    def _prompt_tokens(self, content: Content) -> int:
        case = (len(content.images), content.system)
        if case not in self._prompts:
            bare = replace(content, text="")
            self._prompts[case] = self.count(bare) - self.image_tokens(bare.images)
        return self._prompts[case]

    def _text_tokens(self, text: str) -> int:
        return len(self._plain(_MARKERS.sub("", text))["input_ids"])

    def _plain(self, text: str | list[str]) -> Any:
        """Tokenize one or several texts; control tokens in them count as plain text, as when they are rendered."""
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )

    def _cut(self, text: str, num_tokens: int) -> str:
        """Return the longest prefix of the text with at most `num_tokens` tokens; image markers stay and count as 0."""
        kept = []
        for piece in _MARKERS.split(text):
            end = len(piece)
            if not _MARKERS.fullmatch(piece):
                spans = self._plain(piece)["offset_mapping"]
                if len(spans) > num_tokens:
                    # A character that consists of several tokens is kept whole or not at all.
                    end = min(spans[num_tokens - 1][1], spans[num_tokens][0]) if num_tokens > 0 else 0
                num_tokens = max(num_tokens - len(spans), 0)
            kept.append(piece[:end])
        return "".join(kept)

    def _reduced(
        self, images: tuple[Image.Image, ...], wanted: int, room: int, max_length: int
    ) -> tuple[Image.Image, ...]:
        """Return the images at a lower resolution: at most `wanted` tokens, or at most `room` if that is impossible."""
        tokens = self.image_tokens(images)
        best: tuple[int, tuple[Image.Image, ...]] = (tokens, images)
        lowest = min(1.0, FLOOR / max(max(image.size) for image in images))
        scale = math.sqrt(max(wanted, 1) / tokens)
        while True:
            scale = max(scale, lowest)
            smaller = tuple(_scaled(image, scale) for image in images)
            best = min(best, (self.image_tokens(smaller), smaller), key=lambda pair: pair[0])
            if best[0] <= wanted or scale == lowest:
                break
            scale *= 0.9
        if best[0] > room:
            sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
            raise Gen2EmbedError(
                f"max_length={max_length} leaves {max(room, 0)} tokens for images of {sizes} pixels, which take "
                f"{best[0]} even with every image at its floor of {FLOOR} pixels. "
                "Raise max_length, or pass fewer images."
            )
        logger.info("images of %d tokens reduced to %d to fit max_length=%d", tokens, best[0], max_length)
        return best[1]


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Rounding may make the sides of a narrow image differ by more than 200 to 1.
    return image.resize(min_side_size(size, 1), Image.Resampling.BICUBIC)
