"""Tokenizing runs of the image token: one of each run is tokenized, and its number repeated.

A processor writes the image token once per token of the picture, often a thousand times, and the tokenizer then finds
it again as often. A control token is cut out of the text before anything else is looked at, so what stands around a run
becomes the same whether the token stands there once or often. That holds for added tokens that take neither spaces nor
word boundaries into account, and that no other one overlaps; for others the tokenizer does all of it.
"""

from __future__ import annotations

import re
from typing import Any


def repeat_image_tokens(processor: Any) -> None:
    """Let a processor's tokenizer, which no other object has, encode runs of the image token at once.

    Args:
        processor: A processor of transformers; one without an image token is left as it is.
    """
    tokenizer: Any = getattr(processor, "tokenizer", None)
    numbers = {one.content: number for number, one in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    token: Any = getattr(processor, "image_token", None)
    if token not in numbers or token == tokenizer.unk_token:  # the latter's number may be that of anything
        return
    own = tokenizer.added_tokens_decoder[numbers[token]]
    looks_around = own.normalized or own.lstrip or own.rstrip or own.single_word
    if not looks_around and not any(_overlaps(other, token) for other in numbers if other != token):
        vars(tokenizer)["encode"] = _Encode(tokenizer, token, numbers[token])


def _overlaps(first: str, second: str) -> bool:
    """Return whether the first text holds the second, or ends with its beginning."""
    return second in first or any(first.endswith(second[:length]) for length in range(1, len(second)))


class _Encode:
    """`tokenizer.encode`; only what `encode_marked_chat` of transformers asks for is done in another way."""

    def __init__(self, tokenizer: Any, token: str, number: int) -> None:
        self._tokenizer, self._token, self._number = tokenizer, token, number
        self._runs = re.compile(f"(?:{re.escape(token)})+")

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        plain = type(self._tokenizer).encode
        if isinstance(text, str) and not args and kwargs == {"add_special_tokens": False}:
            lengths = [len(run) // len(self._token) for run in self._runs.findall(text)]
            if any(length > 1 for length in lengths) and not self._tokenizer.split_special_tokens:
                found = plain(self._tokenizer, self._runs.sub(lambda _: self._token, text), **kwargs)
                if found.count(self._number) == len(lengths):
                    return self._repeated(found, lengths)
        return plain(self._tokenizer, text, *args, **kwargs)

    def _repeated(self, found: list[int], lengths: list[int]) -> list[int]:
        ids: list[int] = []
        start = 0
        for length in lengths:
            end = found.index(self._number, start)
            ids += found[start:end]
            ids += [self._number] * length
            start = end + 1
        return ids + found[start:]
