"""Which tokens are the prompt's words, the image, and the rest: found by comparing token ids, for any family.

What a chat template writes around an input, and how a processor spells an image, differs by family. Two things do not:
an input with other words in one place has other ids in that place alone, and an image's tokens have an id of their own.

- The span of some words: the input is prepared with two other texts in their place. The ids that all three share at the
  beginning and at the end are not the words'; what is between them is. A token in which the last letter of the words
  and the first of what follows have merged counts as theirs.
- The image: all tokens with its id, and those between two of them that are special tokens, as the marks of rows and
  tiles are.

The paper's segments go by position: "system" is all that stands before the first image (or the user's text, if that is
first), the header of the user's turn included; "image" is the image; "user" is the rest, to the end of the prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

Mask = npt.NDArray[np.bool_]
SYSTEM, IMAGE, USER = "system", "image", "user"
WORDS, REST = "words", "rest"
OTHER_WORDS = ("7", "Zebra?")
"""Texts that are put in the place of words, to see which ids change."""
_ID_NAMES = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Placed:
    """An input that has some words in one place.

    Attributes:
        name: The place, for people.
        with_words: Makes the input with any words in that place.
        words: The words.
    """

    name: str
    with_words: Callable[[str], Content]
    words: str

    @property
    def content(self) -> Content:
        """The input with its own words."""
        return self.with_words(self.words)


def places(content: Content, words: str) -> tuple[Placed, ...]:
    """Return one input with the same words in three places: as the system prompt, and twice as words of the user.

    The first two differ in role, while the words stand before the input in both; the last two differ in position alone.

    Args:
        content: The input, without a system prompt.
        words: The words.
    """
    marks = "" if "<|image_1|>" in content.text else "".join(f"<|image_{k + 1}|>" for k in range(len(content.images)))
    text, images = content.text, content.images
    behind = f"{text}\n" if text else "\n" if images else ""
    return (
        Placed("system turn", lambda said: Content(text, images, said), words),
        Placed("user turn, before the input", lambda said: Content(f"{said}\n{marks}{text}", images, ""), words),
        Placed("user turn, behind the input", lambda said: Content(f"{behind}{said}", images, ""), words),
    )


def token_ids(model: Gen2Embed, content: Content, side: str) -> list[int]:
    """Return the ids that reach the model.

    Args:
        model: The model.
        content: One input.
        side: "query" or "document".
    """
    return [int(token) for token in model.preprocess([content], task=side)["input_ids"][0]]


def span_of(model: Gen2Embed, placed: Placed, ids: Sequence[int], side: str) -> slice:
    """Return which tokens some words are.

    Args:
        model: The model.
        placed: The input, and the place of the words.
        ids: Its ids with the words in place.
        side: "query" or "document".

    Raises:
        Gen2EmbedError: The words do not reach the model.
    """
    before = behind = len(ids)
    for other in OTHER_WORDS:
        changed = token_ids(model, placed.with_words(other), side)
        before = min(before, _shared(ids, changed))
        behind = min(behind, _shared(ids[::-1], changed[::-1]))
    if before + behind >= len(ids):
        raise Gen2EmbedError(f"{model.source}: the words {placed.words[:40]!r} change no token of the input")
    return slice(before, len(ids) - behind)


def image_mask(model: Gen2Embed, ids: Sequence[int], num_images: int) -> Mask:
    """Return which tokens are those of images.

    Args:
        model: The model.
        ids: The ids that reach it.
        num_images: How many images the input has.

    Raises:
        Gen2EmbedError: There are images, but none of the tokens is known to be theirs.
    """
    mask = np.zeros(len(ids), dtype=bool)
    if not num_images:
        return mask
    config, processor = model[0].config, model.processor
    known = {getattr(owner, name, None) for owner in (config, processor) for name in _ID_NAMES}
    mask[:] = np.isin(ids, [token for token in known if isinstance(token, int)])
    found = np.flatnonzero(mask)
    if not len(found):
        raise Gen2EmbedError(
            f"{model.source}: no token is known to be an image's ({' and '.join(_ID_NAMES)} of its configuration and "
            "processor); pass an input without an image"
        )
    special = _special(model)
    for left, right in itertools.pairwise(found):
        if all(ids[place] in special for place in range(left + 1, right)):
            mask[left:right] = True
    return mask


def by_position(model: Gen2Embed, content: Content, ids: Sequence[int], side: str) -> dict[str, Mask]:
    """Return the paper's segments; those without a token are left out.

    Args:
        model: The model.
        content: The input.
        ids: Its ids.
        side: "query" or "document".

    Raises:
        Gen2EmbedError: The input is empty.
    """
    image = image_mask(model, ids, len(content.images))
    starts = [int(np.flatnonzero(image)[0])] if image.any() else []
    if content.text.strip():
        longer = (Content(other + content.text, content.images, content.system) for other in OTHER_WORDS)
        starts.append(min(_shared(ids, token_ids(model, one, side)) for one in longer))
    if not starts:
        raise Gen2EmbedError("the input has neither an image nor a text; pass --image, --text or both")
    system = np.arange(len(ids)) < min(starts)
    return _present({SYSTEM: system, IMAGE: image, USER: ~system & ~image})


def by_words(model: Gen2Embed, placed: Placed, ids: Sequence[int], side: str) -> dict[str, Mask]:
    """Return which tokens are the prompt's words, the image, and the rest.

    Args:
        model: The model.
        placed: The input, and the place of the words.
        ids: Its ids.
        side: "query" or "document".
    """
    words = np.zeros(len(ids), dtype=bool)
    words[span_of(model, placed, ids, side)] = True
    image = image_mask(model, ids, len(placed.content.images)) & ~words
    return _present({WORDS: words, IMAGE: image, REST: ~words & ~image})


def _present(masks: dict[str, Mask]) -> dict[str, Mask]:
    return {name: mask for name, mask in masks.items() if mask.any()}


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _special(model: Gen2Embed) -> set[int]:
    """Return the ids of special tokens, and of a line break, which some processors put behind a row of tiles."""
    tokenizer: Any = model.tokenizer
    breaks = {token for text in ("\n", "\n\n") for token in tokenizer.encode(text, add_special_tokens=False)}
    single = {token for token in breaks if not tokenizer.decode([token]).strip()}
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids) | single
