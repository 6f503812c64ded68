"""A cache of the prompt prefix that all inputs of a side share; the model runs only the tokens that follow it.

Under the two-level prompt every input of a side begins with the same system turn, which is longer than most labels,
answers and captions. A decoder's token depends only on the tokens before it, so what the layers keep of that prefix is
the same for all inputs:

1. The longest common prefix of two rendered inputs is run through the model once, and its cache is kept.
2. A batch is laid out without padding on the left; the part of the prefix that all its rows share is cut off.
3. The remaining tokens run at their true positions on top of the cache. Last-token pooling, the modules behind it, and
   L2 normalisation in float32 follow.

Every kind of layer that transformers caches will do: full attention, sliding windows, and recurrent states. A cache of
full attention can be cut to a shorter prefix; for the others, one is kept per length.

Cost: one forward pass over the prefix per side, and memory for what the layers keep of it. The vectors are those of the
full forward pass up to rounding (1e-5 in float32 is tested for every family). A family that was not written by hand is
checked on a few inputs when a side is first used; if its vectors differ, every input runs in full, with a warning.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from gen2embed_mteb.embedder.behind_pooling import finish, require_known_modules
from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

_OF_TEXT = frozenset({"input_ids", "attention_mask", "position_ids"})
# What sentence-transformers 6.2 puts beside the features, for itself; it never passes them to the model either.
_BOOKKEEPING = frozenset({"modality", "num_images_per_sample", "num_videos_per_sample", "prompt_length", "task"})
_BOOKKEEPING |= {"special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "query_expansion_positions"}
_MOST_LENGTHS = 16
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""The largest difference of two unit vectors that counts as rounding: wrong caches differ by 0.009 or more. In half
precision rounding alone reaches that, so only gross faults are found there (`_COARSE`)."""
_COARSE = 0.1


@dataclass(frozen=True)
class Prepared:
    """A batch that is ready for the model, on the CPU.

    Attributes:
        input_ids: (n, length) int64, padded on the right, without the shared prefix.
        attention_mask: (n, shared + length) int64, or `None` where nothing is padded.
        position_ids: (n, length) int64, or (3, n, length) for M-RoPE.
        last: (n,) int64, the index of each row's last token in `input_ids`.
        num_shared: How many tokens of the cached prefix stand before `input_ids`.
        others: All other features that the model takes, by name: those of images, and (n, shared + length) integers
            per token, such as the types of tokens.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    last: torch.Tensor
    num_shared: int
    others: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Prefix:
    """The p tokens that all inputs of a side begin with.

    Attributes:
        token_ids: (p,) int64.
        others: Integers per token that the model takes, by name: (1, p).
        caches: What the layers keep of the first tokens, by their number.
    """

    token_ids: torch.Tensor
    others: dict[str, torch.Tensor]
    caches: dict[int, DynamicCache] = field(default_factory=dict)


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
        layers = DynamicCache(config=model[0].model.config).layers
        # transformers 5.23 makes no masks behind a cache without any attention, as `drop-1` may leave it (Qwen3.5).
        attends = not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)
        self._reuse_prefix = reuse_prefix and attends
        self._prefixes: dict[Side, _Prefix] = {}
        self._lock = threading.RLock()

    @property
    def text_alone(self) -> str:
        """Why no input may have images, for messages; empty if the model takes them."""
        return self._model.text_alone

    @property
    def reuses_prefix(self) -> bool:
        """Whether the prefix is run once; `False` also if a check found that it cannot be reused."""
        return self._reuse_prefix

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
        prefix = self._prefix(side) if self._reuse_prefix else None  # may find that it cannot be reused
        shared = len(prefix.token_ids) if prefix is not None and self._reuse_prefix else 0
        return [max(1, count - shared) for count in self._model.count_tokens(texts, image_sizes, task=side)]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Prepared:
        """Render, tokenize and lay out a batch; may run at the same time as `encode_prepared` of another batch.

        Raises:
            ImageError: An image cannot be opened.
            ValueError: An input cannot be made to fit into the model's maximal length.
        """
        if self._reuse_prefix:
            self._prefix(side)  # may find that the prefix cannot be reused
        return self._prepare(side, inputs, reuse=self._reuse_prefix)

    def _prepare(self, side: Side, inputs: list[dict[str, Any]], *, reuse: bool) -> Prepared:
        features = self._preprocess(side, inputs)
        mask = features["attention_mask"].bool()
        lengths = mask.sum(dim=1)
        width = torch.arange(int(lengths.max()))
        # Some processors pad on the left whatever the tokenizer says; here every row begins at column 0.
        columns = (mask.int().argmax(dim=1, keepdim=True) + width).clamp(max=mask.shape[1] - 1)
        aligned = (width < lengths[:, None]).long()
        input_ids = features["input_ids"].gather(1, columns)
        others = self._others(features, columns, aligned)
        positions = self._positions(input_ids, aligned, others)
        shared = self._num_shared(side, input_ids, int(lengths.min())) if reuse else 0
        return Prepared(
            input_ids=input_ids[:, shared:],
            attention_mask=None if bool(aligned.all()) else aligned,
            position_ids=positions[..., shared:],
            last=lengths - 1 - shared,
            num_shared=shared,
            others={name: value for name, value in others.items() if self._takes(name)},
        )

    @torch.inference_mode()
    def encode_prepared(self, side: Side, batch: Prepared) -> npt.NDArray[np.float32]:
        """Run a prepared batch, and return (n, d) float32 unit rows."""
        states = self._last_hidden_state(side, batch)
        vectors = states[torch.arange(len(states), device=states.device), batch.last.to(states.device)]
        vectors = functional.normalize(finish(self._model, vectors, side), dim=1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def _last_hidden_state(self, side: Side, batch: Prepared) -> torch.Tensor:
        """Run the model on a prepared batch, and return (n, length, d) states, in the model's floating type."""
        device = self._model.device
        cache = self._repeated(side, batch.num_shared, len(batch.input_ids)) if batch.num_shared else None
        output = self._model[0].model(
            input_ids=batch.input_ids.to(device),
            attention_mask=None if batch.attention_mask is None else batch.attention_mask.to(device),
            position_ids=batch.position_ids.to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            **{name: feature.to(device) for name, feature in batch.others.items()},
        )
        states: torch.Tensor = output.last_hidden_state
        return states

    def encode_query(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode queries, and return (n, d) float32 unit rows."""
        return self.encode_prepared("query", self.prepare("query", inputs))

    def encode_document(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode candidates, and return (n, d) float32 unit rows."""
        return self.encode_prepared("document", self.prepare("document", inputs))

    def _preprocess(self, side: Side, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Preprocess inputs as `encode_query` and `encode_document` do, with the side's system prompt in `prompts`."""
        return self._model.preprocess(inputs, prompt=self._model.side_prompt(side), task=side)

    def _takes(self, name: str) -> bool:
        """Return whether the model's forward pass takes a feature of this name."""
        taken = self._model[0].model_forward_params  # `None` where it takes any keyword
        return taken is None or name in taken

    def _others(
        self, features: dict[str, Any], columns: torch.Tensor, aligned: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return all features but those of the text; integers per token are laid out as the tokens are."""
        others = {}
        for name, value in features.items():
            if name in _OF_TEXT | _BOOKKEEPING or not isinstance(value, torch.Tensor):
                continue
            per_token = value.shape == features["input_ids"].shape and not value.is_floating_point()
            others[name] = value.gather(1, columns) * aligned if per_token else value
        return others

    def _positions(
        self, input_ids: torch.Tensor, aligned: torch.Tensor, others: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return (n, length) positions, or (3, n, length) where the model has three-dimensional ones."""
        plain = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
        compute = getattr(self._model[0].model, "get_rope_index", None)
        if compute is None:
            return plain
        if all(value.shape == input_ids.shape for value in others.values()):  # no row has an image
            return plain.expand(3, -1, -1)
        known = {"input_ids": input_ids, "attention_mask": aligned, **others}
        wanted = inspect.signature(compute).parameters.keys() & known.keys()
        positions, _ = compute(**{name: known[name] for name in wanted})
        return torch.as_tensor(positions)

    def _num_shared(self, side: Side, input_ids: torch.Tensor, shortest: int) -> int:
        """Return how many tokens of the side's prefix all rows begin with.

        This may be fewer than the whole prefix, since the beginning of a text may merge with the prompt's last token,
        and none at all where a template puts images first.
        """
        prefix = self._prefix(side).token_ids
        # At least the last token of every row must run.
        width = min(len(prefix), shortest - 1)
        equal = (input_ids[:, :width] == prefix[:width]).all(dim=0)
        return int(equal.int().cumprod(dim=0).sum())

    def _prefix(self, side: Side) -> _Prefix:
        with self._lock:  # batches may be prepared in several threads, and none before the check has passed
            if side not in self._prefixes:
                one, other = (self._preprocess(side, [{"text": text}]) for text in ("a", "b"))
                ids = [features["input_ids"][0] for features in (one, other)]
                width = min(map(len, ids))
                length = int((ids[0][:width] == ids[1][:width]).int().cumprod(dim=0).sum())
                everything = torch.arange(len(ids[0]))[None]
                others = self._others(one, everything, torch.ones_like(everything))
                others = {name: value[:, :length] for name, value in others.items() if self._takes(name)}
                self._prefixes[side] = _Prefix(ids[0][:length], others)
                if length and family_of(self._model[0].config.model_type).is_generic:
                    self._check(side)
            return self._prefixes[side]

    def _check(self, side: Side) -> None:
        """Compare vectors with and without the prefix, and of a batch with those of single inputs.

        If they differ, the prefix is not reused, and a warning says which of the two failed.
        """
        inputs: list[dict[str, Any]] = [{"text": "a"}, {"text": "What is the name of the place in this picture?"}]
        if hasattr(self._model.processor, "image_processor"):
            noise = Image.effect_noise((64, 64), 80).convert("RGB")
            inputs += [{"image": noise}, {"text": "What is it?", "image": noise}]
        full = [self._prepare(side, [sample], reuse=False) for sample in inputs]
        single = np.concatenate([self.encode_prepared(side, batch) for batch in full])
        limit = _TOLERANCE.get(self._model.dtype, _COARSE)
        for name, reuse in (("in a batch of texts and images", False), ("with the cached prompt prefix", True)):
            batches = [inputs, *([sample] for sample in inputs)] if reuse else [inputs]
            for batch in batches:
                rows = [inputs.index(sample) for sample in batch]
                vectors = self.encode_prepared(side, self._prepare(side, batch, reuse=reuse))
                difference = float(np.abs(vectors - single[rows]).max())
                if not difference <= limit:  # NaN is a failure, too
                    self._reuse_prefix = False
                    logger.warning(
                        "%s: the vectors of %s %s differ from those of single inputs by %.2g; every input now runs in "
                        "full, without the cached prefix%s",
                        self._model.source,
                        "queries" if side == "query" else "documents",
                        name,
                        difference,
                        "" if reuse else ". Vectors depend on the batch: use batches of one input",
                    )
                    return

    def _repeated(self, side: Side, length: int, rows: int) -> DynamicCache:
        """Return the cache of the first tokens of the side's prefix, for each of `rows` rows."""
        kept = self._cache(side, length)
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
        layer.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self._model.device))
        return layer

    @torch.inference_mode()
    def _cache(self, side: Side, length: int) -> DynamicCache:
        """Return what the layers keep of the first `length` tokens of the side's prefix.

        Where all layers attend to all tokens it is the cache of the whole prefix, which can be cut.
        """
        prefix = self._prefixes[side]
        whole = len(prefix.token_ids)
        for wanted in (whole, length):
            if wanted not in prefix.caches:
                if len(prefix.caches) == _MOST_LENGTHS:
                    del prefix.caches[next(kept for kept in prefix.caches if kept != whole)]
                prefix.caches[wanted] = self._run(prefix, wanted)
            if all(type(layer) is DynamicLayer for layer in prefix.caches[wanted].layers):
                break
        return prefix.caches[wanted]

    def _run(self, prefix: _Prefix, length: int) -> DynamicCache:
        """Run the first `length` tokens of a prefix, and return what the layers keep of them."""
        model, device = self._model[0].model, self._model.device
        positions = torch.arange(length, device=device)[None]
        cache = DynamicCache(config=model.config)
        model(
            input_ids=prefix.token_ids[None, :length].to(device),
            position_ids=positions.expand(3, 1, -1) if hasattr(model, "get_rope_index") else positions,
            past_key_values=cache,
            use_cache=True,
            **{name: value[:, :length].to(device) for name, value in prefix.others.items()},
        )
        return cache
