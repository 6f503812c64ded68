"""Token sequences that begin alike: their beginning runs once, and what the layers keep of it serves all of them.

A decoder's token depends only on the tokens before it. Sequences are laid out without padding on the left, so that the
tokens that they share stand at the same positions, and the rest runs on top of the kept keys, values and states.

Every kind of layer that transformers caches will do: full attention, sliding windows, and recurrent states. A cache of
full attention can be cut to a shorter beginning; for the others, one is kept per length.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from gen2embed_mteb.embedder.passes.phrase_pooling import PHRASE_LENGTH
from gen2embed_mteb.embedder.readouts.readout import undisturbed

OF_TEXT = frozenset({"input_ids", "attention_mask", "position_ids"})
# What sentence-transformers 6.2 puts beside the features, for itself; it never passes them to the model either.
_BOOKKEEPING = frozenset({"modality", "num_images_per_sample", "num_videos_per_sample", "prompt_length", "task"})
_BOOKKEEPING |= {"special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "query_expansion_positions"}
_BOOKKEEPING |= {PHRASE_LENGTH}
_MOST_LENGTHS = 16
"""The most caches that are kept of one beginning, where a cache cannot be cut."""


@dataclass(frozen=True)
class Rows:
    """n sequences, padded on the right.

    Attributes:
        input_ids: (n, length) int64.
        mask: (n, length) int64, 1 where there is a token.
        lengths: (n,) int64.
        positions: (n, length) int64, or (3, n, length) for M-RoPE.
        others: All other features, by name: those of images, and (n, length) integers per token.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    others: dict[str, torch.Tensor]


def reuse_possible(config: Any) -> bool:
    """Return whether a model of this configuration can go on from a cache.

    transformers 5.23 makes no masks behind a cache without any attention, as `drop-1` may leave it (Qwen3.5).
    """
    layers = DynamicCache(config=config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def longest_shared(config: Any) -> int | None:
    """Return the most tokens of a row that may share its beginning; `None` if there is no such limit.

    Phi-3.5-V scales the positions of longer rows by other factors, from their first token on.
    """
    limit: int | None = getattr(config, "longest_short_input", None)
    return limit


def taken_by(module: Any, name: str) -> bool:
    """Return whether the forward pass of a sentence-transformers module's model takes a feature of this name."""
    taken = module.model_forward_params  # `None` where it takes any keyword
    return taken is None or name in taken


def laid_out(features: Mapping[str, Any], base: Any) -> Rows:
    """Return the features of n conversations with every row at column 0.

    Some processors pad on the left whatever the tokenizer says.

    Args:
        features: What a processor made of them.
        base: The model of transformers without its output layer, which computes three-dimensional positions.
    """
    mask = features["attention_mask"].bool()
    lengths = mask.sum(dim=1)
    width = torch.arange(int(lengths.max()))
    columns = (mask.int().argmax(dim=1, keepdim=True) + width).clamp(max=mask.shape[1] - 1)
    aligned = (width < lengths[:, None]).long()
    input_ids = features["input_ids"].gather(1, columns)
    others = {}
    for name, value in features.items():
        if name in OF_TEXT | _BOOKKEEPING or not isinstance(value, torch.Tensor):
            continue
        per_token = value.shape == features["input_ids"].shape and not value.is_floating_point()
        others[name] = value.gather(1, columns) * aligned if per_token else value
    return Rows(input_ids, aligned, lengths, _positions(base, input_ids, aligned, others), others)


def _positions(
    base: Any, input_ids: torch.Tensor, aligned: torch.Tensor, others: dict[str, torch.Tensor]
) -> torch.Tensor:
    plain = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
    compute = getattr(base, "get_rope_index", None)
    if compute is None:
        return plain
    if all(value.shape == input_ids.shape for value in others.values()):  # no row has an image
        return plain.expand(3, -1, -1)
    known = {"input_ids": input_ids, "attention_mask": aligned, **others}
    wanted = inspect.signature(compute).parameters.keys() & known.keys()
    positions, _ = compute(**{name: known[name] for name in wanted})
    return torch.as_tensor(positions)


def split_features(rows: Rows, takes: Callable[[str], bool]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the features of tokens, and those of images.

    Args:
        rows: The sequences.
        takes: Returns whether the model takes a feature of a name; others are left out.
    """
    taken = {name: value for name, value in rows.others.items() if takes(name)}
    per_token = {name: value for name, value in taken.items() if value.shape == rows.input_ids.shape}
    return per_token, {name: value for name, value in taken.items() if name not in per_token}


@dataclass(frozen=True)
class SharedBeginning:
    """The p tokens that several sequences begin with.

    Attributes:
        model: Runs them: a model of transformers, with its output layer or without.
        token_ids: (p,) int64.
        positions: (1, p) int64, or (3, 1, p).
        per_token: Integers per token that the model takes, by name: (1, p).
        images: Features of the images among the tokens, by name.
        arguments: Further arguments of the model's forward pass.
        caches: What the layers keep of the first tokens, by their number.
    """

    model: Any
    token_ids: torch.Tensor
    positions: torch.Tensor
    per_token: Mapping[str, torch.Tensor]
    images: Mapping[str, torch.Tensor] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    caches: dict[int, DynamicCache] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.token_ids)

    @classmethod
    def of(cls, model: Any, row: Rows, length: int, takes: Callable[[str], bool], **arguments: Any) -> SharedBeginning:
        """Return the first tokens of a sequence; its images must all stand among them.

        Args:
            model: Runs them.
            row: One sequence.
            length: The number p of tokens.
            takes: Returns whether the model takes a feature of a name.
            arguments: Further arguments of the model's forward pass.
        """
        per_token, images = split_features(row, takes)
        return cls(
            model,
            row.input_ids[0, :length],
            row.positions[..., :length],
            {name: value[:, :length] for name, value in per_token.items()},
            images,
            arguments,
        )

    def num_shared(self, input_ids: torch.Tensor, most: int) -> int:
        """Return how many of the tokens all rows begin with.

        Args:
            input_ids: (n, length) int64.
            most: The most that it may be: some tokens of the shortest row are to be left, at least one.
        """
        limit = longest_shared(self.model.config)
        if limit is not None and input_ids.shape[1] > limit:
            return 0
        width = max(0, min(len(self.token_ids), most))
        equal = (input_ids[:, :width] == self.token_ids[:width]).all(dim=0)
        return int(equal.int().cumprod(dim=0).sum())

    def repeated(self, length: int, rows: int) -> DynamicCache:
        """Return the cache of the first `length` tokens, for each of `rows` rows."""
        kept = self._cache(length)
        cache = copy.copy(kept)
        cache.layers = [self._repeated_layer(layer, length, rows) for layer in kept.layers]
        return cache

    def _repeated_layer(self, kept: Any, length: int, rows: int) -> Any:
        if type(kept) is DynamicLayer:  # views suffice: it never writes into its tensors
            layer = copy.copy(kept)
            layer.keys = kept.keys[:, :, :length].expand(rows, -1, -1, -1)
            layer.values = kept.values[:, :, :length].expand(rows, -1, -1, -1)
            return layer
        layer = copy.deepcopy(kept)
        layer.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.model.device))
        return layer

    @torch.inference_mode()
    def _cache(self, length: int) -> DynamicCache:
        """Return what the layers keep of the first `length` tokens.

        Where all layers attend to all tokens it is the cache of all tokens, which can be cut.
        """
        whole = len(self.token_ids)
        for wanted in (whole, length):
            if wanted not in self.caches:
                if len(self.caches) == _MOST_LENGTHS:
                    del self.caches[next(kept for kept in self.caches if kept != whole)]
                self.caches[wanted] = self._run(wanted)
            if all(type(layer) is DynamicLayer for layer in self.caches[wanted].layers):
                break
        return self.caches[wanted]

    def _run(self, length: int) -> DynamicCache:
        """Run the first `length` tokens, and return what the layers keep of them."""
        device = self.model.device
        with undisturbed(self.model):  # the number of layers in its configuration
            cache = DynamicCache(config=self.model.config)
            self.model(
                input_ids=self.token_ids[None, :length].to(device),
                position_ids=self.positions[..., :length].to(device),
                past_key_values=cache,
                use_cache=True,
                **{name: value[:, :length].to(device) for name, value in self.per_token.items()},
                **{name: value.to(device) for name, value in self.images.items()},
                **self.arguments,
            )
        return cache
