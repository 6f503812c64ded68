"""A cache of the prompt prefix that all inputs of a side share; the model runs only the tokens that follow it.

Under the two-level prompt every input of a side begins with the same system turn, which is longer than most labels,
answers and captions. A decoder's token depends only on the tokens before it, so the keys and values of that prefix are
the same for all inputs:

1. The longest common prefix of two rendered inputs is run through the model once, and its key/value cache is kept.
2. A batch is laid out without padding on the left; the part of the prefix that all its rows share is cut off.
3. The remaining tokens run at their true positions on top of the cache. Last-token pooling, the modules behind it, and
   L2 normalisation in float32 follow.

Cost: one forward pass over the prefix per side, and memory for the keys and values of its tokens. The vectors are those
of the full forward pass up to rounding (1e-5 in float32 is tested for every family).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import DynamicCache

from gen2embed_mteb.embedder.behind_pooling import finish, require_known_modules
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

IMAGE_FEATURES = ("pixel_values", "image_grid_thw", "image_sizes")


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready for the model, on the CPU.

    Attributes:
        input_ids: (n, length) int64, padded on the right, without the shared prefix.
        attention_mask: (n, shared + length) int64, or `None` where nothing is padded.
        position_ids: (n, length) int64, or (3, n, length) for M-RoPE.
        last: (n,) int64, the index of each row's last token in `input_ids`.
        num_shared: How many tokens of the cached prefix stand before `input_ids`.
        images: The image features, by name.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    last: torch.Tensor
    num_shared: int
    images: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Prefix:
    """The p tokens that all inputs of a side begin with, and their keys and values: (1, heads, p, d) per layer."""

    token_ids: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


class PrefixEncoder:
    """`Gen2Embed` for bulk encoding: counts tokens, prepares batches ahead, and runs a shared prefix once.

    The weights and the prompt of the model must not change while this object is in use.

    Args:
        model: The model.
        reuse_prefix: `False` runs every input in full.
    """

    def __init__(self, model: Gen2Embed, *, reuse_prefix: bool = True) -> None:
        """Keep the model; the prefix of a side is run when that side is first used.

        Raises:
            Gen2EmbedError: The model has a module that needs more than the pooled vector.
        """
        require_known_modules(model)
        self._model = model
        self._reuse_prefix = reuse_prefix and attends_to_all(model[0].model.config)
        self._prefixes: dict[Side, _Prefix] = {}

    @property
    def batch_tokens(self) -> int:
        """The number of tokens per call: few on a CPU, so that activations stay in its caches, and many on a GPU."""
        return 1024 if self._model.device.type == "cpu" else 8192

    def count_tokens(
        self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[int]:
        """Return how many tokens of each input are run: with prompt and image tokens, without the shared prefix.

        Args:
            side: `query` or `document`.
            texts: n texts.
            image_sizes: For each text the (width, height) of its images, in pixels.

        Returns:
            n numbers of tokens. A number may be wrong by a token or two, where the tokens of text and prompt merge.
        """
        shared = len(self._prefix(side).token_ids) if self._reuse_prefix else 0
        return [max(1, count - shared) for count in self._model.count_tokens(texts, image_sizes, task=side)]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Prepared:
        """Render, tokenize and lay out a batch; may run at the same time as `encode_prepared` of another batch.

        Raises:
            ImageError: An image cannot be opened.
            ValueError: An input cannot be made to fit into the model's maximal length.
        """
        features = self._preprocess(side, inputs)
        images = {name: features[name] for name in IMAGE_FEATURES if name in features}
        mask = features["attention_mask"].bool()
        lengths = mask.sum(dim=1)
        width = torch.arange(int(lengths.max()))
        columns = (mask.int().argmax(dim=1, keepdim=True) + width).clamp(max=mask.shape[1] - 1)
        aligned = (width < lengths[:, None]).long()
        input_ids = features["input_ids"].gather(1, columns)
        positions = self._positions(features, columns, input_ids, aligned, images)
        shared = self._num_shared(side, input_ids, int(lengths.min()))
        return Prepared(
            input_ids=input_ids[:, shared:],
            attention_mask=None if bool(aligned.all()) else aligned,
            position_ids=positions[..., shared:],
            last=lengths - 1 - shared,
            num_shared=shared,
            images=images,
        )

    @torch.inference_mode()
    def encode_prepared(self, side: Side, batch: Prepared) -> npt.NDArray[np.float32]:
        """Run a prepared batch, and return (n, d) float32 unit rows."""
        device, cache = self._model.device, None
        if batch.num_shared:
            rows = len(batch.input_ids)
            cache = DynamicCache(
                tuple(part[:, :, : batch.num_shared].expand(rows, -1, -1, -1) for part in layer)
                for layer in self._prefixes[side].layers
            )
        output = self._model[0].model(
            input_ids=batch.input_ids.to(device),
            attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
            position_ids=batch.position_ids.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            **{name: feature.to(device) for name, feature in batch.images.items()},
        )
        states = output.last_hidden_state
        vectors = states[torch.arange(len(states), device=device), batch.last.to(device)]
        vectors = functional.normalize(finish(self._model, vectors, side), dim=1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def encode_query(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode queries, and return (n, d) float32 unit rows."""
        return self.encode_prepared("query", self.prepare("query", inputs))

    def encode_document(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode candidates, and return (n, d) float32 unit rows."""
        return self.encode_prepared("document", self.prepare("document", inputs))

    def _preprocess(self, side: Side, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Preprocess inputs as `encode_query` and `encode_document` do, with the side's system prompt in `prompts`."""
        return self._model.preprocess(inputs, prompt=self._model.side_prompt(side), task=side)

    def _positions(
        self,
        features: dict[str, torch.Tensor],
        columns: torch.Tensor,
        input_ids: torch.Tensor,
        mask: torch.Tensor,
        images: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        plain = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
        if not self._model.uses_mrope:
            return plain
        if not images:
            return plain.expand(3, -1, -1)
        positions, _ = self._model[0].model.get_rope_index(
            input_ids,
            mm_token_type_ids=features["mm_token_type_ids"].gather(1, columns) * mask,
            image_grid_thw=features["image_grid_thw"],
            attention_mask=mask,
        )
        return torch.as_tensor(positions)

    def _num_shared(self, side: Side, input_ids: torch.Tensor, shortest: int) -> int:
        """Return how many tokens of the side's prefix all rows begin with.

        This may be fewer than the whole prefix, since the beginning of a text may merge with the prompt's last token.
        """
        if not self._reuse_prefix:
            return 0
        prefix = self._prefix(side).token_ids
        # At least the last token of every row must run.
        width = min(len(prefix), shortest - 1)
        equal = (input_ids[:, :width] == prefix[:width]).all(dim=0)
        return int(equal.int().cumprod(dim=0).sum())

    @torch.inference_mode()
    def _prefix(self, side: Side) -> _Prefix:
        if side not in self._prefixes:
            one, other = (self._preprocess(side, [{"text": text}])["input_ids"][0] for text in ("a", "b"))
            width = min(len(one), len(other))
            length = int((one[:width] == other[:width]).int().cumprod(dim=0).sum())
            token_ids = one[:length]
            layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
            if length:
                positions = torch.arange(length, device=self._model.device)[None]
                cache = DynamicCache()
                self._model[0].model(
                    input_ids=token_ids[None].to(self._model.device),
                    position_ids=positions.expand(3, 1, -1) if self._model.uses_mrope else positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                layers = tuple((layer.keys, layer.values) for layer in cache.layers)
            self._prefixes[side] = _Prefix(token_ids, layers)
        return self._prefixes[side]


def attends_to_all(config: Any) -> bool:
    """Return whether every decoder layer of this configuration attends to all tokens.

    A layer with a sliding window drops the keys of a prefix, so that the prefix cannot be reused.
    """
    config = config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is not None:
        return set(types) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None
