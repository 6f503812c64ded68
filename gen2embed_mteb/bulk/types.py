"""What is encoded, and what bulk encoding needs of the model that does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gen2embed_mteb.embedder.prompts import Side
from gen2embed_mteb.images.decoding import Size


class Item(NamedTuple):
    """What is encoded: a text and the paths of its images; hashable, equal when both are equal."""

    text: str
    images: tuple[str, ...] = ()


class Fault(NamedTuple):
    """Why an item has no vector: the file at fault (empty if it is the item itself) and the reason."""

    file: str
    reason: str


class Encoder(Protocol):
    """What bulk encoding needs of a model; `Gen2Embed` is one.

    Both methods take a list of `{"text": str, "image": PIL image or list of them}`, either key missing, and return
    an array-like of shape (n, d), one unit row an input.
    """

    def encode_query(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode queries: (n, d) float32 unit rows."""

    def encode_document(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode candidates: (n, d) float32 unit rows."""


@runtime_checkable
class StagedEncoder(Protocol):
    """An encoder whose work comes in stages, so that the next batch is prepared while the model runs this one."""

    @property
    def batch_tokens(self) -> int:
        """How many tokens a call should have, padding included, where the model is."""

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the lengths of n inputs in tokens, from their texts and the (width, height) of their images."""

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Any:
        """Everything before the model, on the CPU; called from one thread."""

    def encode_prepared(self, side: Side, batch: Any) -> Any:
        """(n, d) float32 unit rows of what `prepare` returned."""


def staged(encoder: Encoder) -> StagedEncoder:
    """Return the encoder, as one that works in stages."""
    return encoder if isinstance(encoder, StagedEncoder) else _Unstaged(encoder)


class _Unstaged:
    """A plain `Encoder` as a `StagedEncoder`; lengths are guessed."""

    batch_tokens = 8192

    def __init__(self, encoder: Encoder) -> None:
        self._encode = {"query": encoder.encode_query, "document": encoder.encode_document}

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        return [1 + len(text) // 4 + 256 * len(sizes) for text, sizes in zip(texts, image_sizes, strict=True)]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def encode_prepared(self, side: Side, batch: list[dict[str, Any]]) -> Any:
        return self._encode[side](batch)
