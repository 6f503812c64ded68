"""The attention of every layer of one input, reduced as soon as a layer has run.

1. The decoder runs with the eager attention of its own class, which is the one that returns its weights.
2. A hook on each layer takes them, (heads, n, n) numbers, and keeps three vectors of n numbers and a small map.
3. The weights are dropped before the next layer runs, so that one layer's are in memory at a time.

What a layer may attend to is read from the mask that it gets, so that sliding windows and images that see themselves
as a whole are counted as what they are.

Cost: one forward pass; heads · n² numbers for one layer, a few times over: 4,096 tokens and 32 heads in float32 are
2 GB each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb.embedder.readouts.decoder_parts import DecoderParts
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.embedder.preparation.inputs import Content

Vector = npt.NDArray[np.float64]

CELLS = 44
"""The most cells of a pooled map along an edge."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer, A, averaged over its heads: row i spreads 1 over the n tokens.

    Attributes:
        layer: The layer's number, from 0.
        received: (n,) what each token receives from all rows together: the column sums of A.
        uniform: (n,) the same if each row spread 1 evenly over the tokens that it may see.
        last: (n,) the last row of A; the embedding is made of what this row reads.
        pooled: (c, c) the mean of A over blocks of tokens, of what may be seen alone; NaN where nothing may be.
    """

    layer: int
    received: Vector
    uniform: Vector
    last: Vector
    pooled: Vector


def uniform_received(length: int) -> Vector:
    """Return what each token receives if every row spreads 1 evenly over itself and the tokens before it.

    Args:
        length: The number n of tokens.

    Returns:
        (n,): token j receives the sum of 1 / (i + 1) over the rows i ≥ j.
    """
    shares = 1.0 / np.arange(1, length + 1)
    return np.cumsum(shares[::-1])[::-1]


def measure(model: Gen2Embed, content: Content, side: str, most_tokens: int) -> tuple[list[int], list[LayerAttention]]:
    """Run one input, and return the ids of its tokens and the attention of every layer that has any.

    Args:
        model: The model; its prompt is rendered around the input.
        content: The input.
        side: "query" or "document".
        most_tokens: The longest input that is run.

    Raises:
        Gen2EmbedError: The input is longer, or would be cut; or no layer of the decoder returns attention weights.
    """
    features = model.preprocess([content], task=side)
    ids = [int(token) for token in features["input_ids"][0]]
    check_length(model, len(ids), most_tokens)
    features = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in features.items()
    }
    parts = DecoderParts(model[0].model, lambda reason: Gen2EmbedError(f"{model.source}: {reason}"))
    found: dict[int, LayerAttention] = {}
    handles = [
        part.register_forward_hook(_taking(number, len(ids), found), with_kwargs=True)
        for number, layer in enumerate(parts.layers)
        for _, part in layer.named_children()
    ]
    try:
        with _eager(parts.decoder), torch.inference_mode():
            model[0].forward(features)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        kind = type(parts.layers[0]).__name__
        raise Gen2EmbedError(f"{model.source}: no layer {kind} returns its attention weights; use another model")
    return ids, [found[number] for number in sorted(found)]


def check_length(model: Gen2Embed, length: int, most_tokens: int) -> None:
    """Refuse an input that is too long, or that the model's own limit would cut.

    Args:
        model: The model.
        length: The input's number of tokens.
        most_tokens: The most that are accepted.

    Raises:
        Gen2EmbedError: It is; the message says what to do.
    """
    limit = model.max_seq_length
    if limit is not None and length >= limit:
        raise Gen2EmbedError(
            f"the input fills {length} tokens, as many as max_length lets through, and may have been cut; shorten the "
            "text, or raise --max_length"
        )
    if length > most_tokens:
        raise Gen2EmbedError(
            f"the input has {length} tokens; one layer's attention has heads x {length} x {length} numbers. Shorten "
            "it, take a smaller image, or raise --max_tokens if memory suffices"
        )


def _taking(number: int, length: int, found: dict[int, LayerAttention]) -> Any:
    """Return a hook that reduces what an attention module returns beside its output."""

    def take(_: Any, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.shape[-2:] == (length, length):
            found[number] = reduced(number, weights[0], kwargs.get("attention_mask"))

    return take


def reduced(number: int, weights: torch.Tensor, mask: torch.Tensor | None) -> LayerAttention:
    """Reduce the weights of one layer.

    Args:
        number: The layer's number.
        weights: (heads, n, n), every row of which sums to 1.
        mask: What the layer's attention got: (1, 1, n, n), 0 or true where row i may see token j; `None` for itself
            and all before.
    """
    mean = weights.float().mean(dim=0).cpu()
    length = mean.shape[0]
    seen = _seen(mask, length)
    even = seen / seen.sum(dim=1, keepdim=True).clamp(min=1)
    block = math.ceil(length / CELLS)
    counts = _block_sums(seen.float(), block)
    pooled = _block_sums(mean, block) / counts  # 0 / 0 is NaN
    return LayerAttention(
        layer=number,
        received=_numbers(mean.sum(0, dtype=torch.float64)),
        uniform=_numbers(even.sum(0, dtype=torch.float64)),
        last=_numbers(mean[-1]),
        pooled=_numbers(pooled),
    )


def _seen(mask: torch.Tensor | None, length: int) -> torch.Tensor:
    if mask is None or mask.ndim != 4 or mask.shape[-2:] != (length, length):
        return torch.ones(length, length, dtype=torch.bool).tril()
    return (mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0).cpu()


def _block_sums(values: torch.Tensor, block: int) -> torch.Tensor:
    cells = math.ceil(values.shape[0] / block)
    padded = torch.zeros(cells * block, cells * block, dtype=values.dtype)
    padded[: values.shape[0], : values.shape[0]] = values
    return padded.reshape(cells, block, cells, block).sum(dim=(1, 3))


def _numbers(values: torch.Tensor) -> Vector:
    return np.asarray(values.double().numpy(), dtype=np.float64)


@contextmanager
def _eager(decoder: Any) -> Iterator[None]:
    """Let a decoder compute its attention in the form that returns the weights."""
    before = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation("eager")
    except ValueError as error:
        raise Gen2EmbedError(
            f"{type(decoder).__name__} has no eager attention, which alone returns weights ({error}); use another model"
        ) from error
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)
