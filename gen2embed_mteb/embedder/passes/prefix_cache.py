"""A cache of the prompt prefix that all inputs of a side share; the model runs only the tokens that follow it.

Under the two-level prompt every input of a side begins with the same system turn, which is longer than most labels,
answers and captions. A decoder's token depends only on the tokens before it, so what the layers keep of that prefix is
the same for all inputs:

1. The longest common prefix of two rendered inputs is run through the model once, and its cache is kept.
2. A batch is laid out without padding on the left; the part of the prefix that all its rows share is cut off.
3. The remaining tokens run at their true positions on top of the cache. Last-token pooling, the modules behind it, and
   L2 normalisation in float32 follow.

`shared_beginning.py` keeps the cache, whatever the layers are.

Cost: one forward pass over the prefix per side, and memory for what the layers keep of it. The vectors are those of the
full forward pass up to rounding (1e-5 in float32 is tested for every family). A family that was not written by hand is
checked on a few inputs when a side is first used; if its vectors differ, every input runs in full, with a warning.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.passes.behind_pooling import finish, require_known_modules
from gen2embed_mteb.embedder.passes.phrase_pooling import PHRASE_LENGTH, mean_of_last
from gen2embed_mteb.embedder.passes.shared_beginning import SharedBeginning, laid_out, reuse_possible, taken_by
from gen2embed_mteb.embedder.preparation.compact_patches import PIXELS, CompactPatches
from gen2embed_mteb.embedder.preparation.in_workers import FeaturePreparer
from gen2embed_mteb.embedder.prompts.dataset_prompts import prompts_for
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

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
        pooled: (n,) int64, how many of each row's last states are averaged; `None` where the last one is taken.
        num_shared: How many tokens of the cached prefix stand before `input_ids`.
        others: All other features that the model takes, by name: those of images, and (n, shared + length) integers
            per token, such as the types of tokens.
        patches: What brings `others["pixel_values"]` from bytes to the form that the model takes; `None` if they have
            it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor
    last: torch.Tensor
    num_shared: int
    others: dict[str, torch.Tensor]
    pooled: torch.Tensor | None = None
    patches: CompactPatches | None = None


def pinned(batch: Prepared, device: torch.device) -> Prepared:
    """Return a batch for a GPU in pinned memory, from which it is copied while the GPU computes; others as they are."""
    if device.type != "cuda":
        return batch
    return replace(
        batch,
        input_ids=batch.input_ids.pin_memory(),
        attention_mask=None if batch.attention_mask is None else batch.attention_mask.pin_memory(),
        position_ids=batch.position_ids.pin_memory(),
        others={name: feature.pin_memory() for name, feature in batch.others.items()},
    )


def batch_tokens_on(device: str) -> int:
    """Return the tokens per call for a kind of device: few on a CPU, so that activations stay in its caches."""
    return 1024 if device == "cpu" else 8192


class PrefixEncoder:
    """`Gen2Embed` for bulk encoding: counts tokens, prepares batches ahead, and runs a shared prefix once.

    The weights and the prompt of the model must not change while this object is in use.

    Args:
        model: The model.
        reuse_prefix: `False` runs every input in full.
        prompts: The prompts of a dataset, by side (see `for_dataset`); a side without one gets the model's usual texts.
    """

    def __init__(
        self, model: Gen2Embed, *, reuse_prefix: bool = True, prompts: Mapping[Side, str] | None = None
    ) -> None:
        """Keep the model; the prefix of a side is run when that side is first used.

        Raises:
            Gen2EmbedError: The model has a module that needs more than the pooled vector.
        """
        require_known_modules(model)
        self._model = model
        self.prompts: dict[Side, str] = dict(prompts or {})
        self._of_datasets: dict[tuple[tuple[Side, str], ...], PrefixEncoder] = {}
        self._reuse_prefix = reuse_prefix and reuse_possible(model[0].model.config)
        self._prefixes: dict[Side, SharedBeginning] = {}
        self._lock = threading.RLock()
        self._compact: list[CompactPatches | None] = []  # one, found when it is first asked for

    @property
    def text_alone(self) -> str:
        """Why no input may have images, for messages; empty if the model takes them."""
        return self._model.text_alone

    @property
    def reuses_prefix(self) -> bool:
        """Whether the prefix is run once; `False` also if a check found that it cannot be reused."""
        return self._reuse_prefix

    def for_dataset(self, dataset: str) -> PrefixEncoder | None:
        """Return the encoder that has the prompts of a dataset, with a shared prefix of its own.

        Args:
            dataset: The dataset's name, as in `Gen2Embed.prompts` before the colon.

        Returns:
            The same object for datasets with the same prompts; `None` if the model has no prompts for this one, so that
            its usual texts are used.
        """
        prompts = prompts_for(self._model, dataset)
        if not prompts:
            return None
        key = tuple(sorted(prompts.items()))
        if key not in self._of_datasets:
            other = PrefixEncoder(self._model, reuse_prefix=self._reuse_prefix, prompts=prompts)
            other._compact, self._of_datasets[key] = self._compact, other
        return self._of_datasets[key]

    @property
    def batch_tokens(self) -> int:
        """The number of tokens per call that suits the model's device."""
        return batch_tokens_on(self._model.device.type)

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
        shared = len(prefix) if prefix is not None and self._reuse_prefix else 0
        counts = self._model.count_tokens(texts, image_sizes, task=side, prompt=self._prompt(side))
        return [max(1, count - shared) for count in counts]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Prepared:
        """Render, tokenize and lay out a batch; may run at the same time as `encode_prepared` of another batch.

        Raises:
            ImageError: An image cannot be opened.
            ValueError: An input cannot be made to fit into the model's maximal length.
        """
        if self._reuse_prefix:
            self._prefix(side)  # may find that the prefix cannot be reused
        return self._prepare(side, inputs, reuse=self._reuse_prefix)

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the model runs on the CPU, whose cores worker processes would take from it."""
        return self._model.device.type == "cpu"

    def preparer(self) -> FeaturePreparer:
        """Return what prepares inputs in a worker process; the same for all datasets."""
        if not self._compact:
            self._compact.append(CompactPatches.of(getattr(self._model.processor, "image_processor", None)))
        return FeaturePreparer(self._model, self._compact[0])

    def arguments(self, side: Side) -> dict[str, Any]:
        """Return what the preparer is to know of a batch: its side and the prompt."""
        if self._reuse_prefix:
            self._prefix(side)
        return {"side": side, "prompt": self._prompt(side)}

    def completed(self, side: Side, arrays: Mapping[str, npt.NDArray[Any]]) -> Prepared:
        """Lay out what the preparer returned, as `prepare` does."""
        features = {name: torch.from_numpy(array) for name, array in arrays.items()}
        compact = PIXELS in features and features[PIXELS].dtype == torch.uint8
        batch = self._laid_out(side, features, reuse=self._reuse_prefix)
        return replace(pinned(batch, self._model.device), patches=self._compact[0] if compact else None)

    def _prepare(self, side: Side, inputs: list[dict[str, Any]], *, reuse: bool) -> Prepared:
        return self._laid_out(side, self._preprocess(side, inputs), reuse=reuse)

    def _laid_out(self, side: Side, features: Mapping[str, Any], *, reuse: bool) -> Prepared:
        rows, pooled = laid_out(features, self._model[0].model), features.get(PHRASE_LENGTH)
        needed = 1 if pooled is None else int(pooled.max())  # states that must be computed, at the end of every row
        shared = self._prefix(side).num_shared(rows.input_ids, int(rows.lengths.min()) - needed) if reuse else 0
        return Prepared(
            input_ids=rows.input_ids[:, shared:],
            attention_mask=None if bool(rows.mask.all()) else rows.mask,
            position_ids=rows.positions[..., shared:],
            last=rows.lengths - 1 - shared,
            num_shared=shared,
            others={name: value for name, value in rows.others.items() if self._takes(name)},
            pooled=pooled,
        )

    @torch.inference_mode()
    def encode_prepared(self, side: Side, batch: Prepared) -> npt.NDArray[np.float32]:
        """Run a prepared batch, and return (n, d) float32 unit rows."""
        states = self._last_hidden_state(side, batch)
        last = batch.last.to(states.device)
        if batch.pooled is None:
            vectors = states[torch.arange(len(states), device=states.device), last]
        else:
            vectors = mean_of_last(states, last, batch.pooled.to(states.device))
        vectors = functional.normalize(finish(self._model, vectors, side), dim=1)
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def _last_hidden_state(self, side: Side, batch: Prepared) -> torch.Tensor:
        """Run the model on a prepared batch, and return (n, length, d) states, in the model's floating type."""
        device = self._model.device
        cache = None
        if batch.num_shared:
            cache = self._prefixes[side].repeated(batch.num_shared, len(batch.input_ids))
        # From memory that is not pinned this waits as ever.
        later = device.type == "cuda"
        others = {name: feature.to(device, non_blocking=later) for name, feature in batch.others.items()}
        if batch.patches is not None:
            others[PIXELS] = batch.patches.expanded(others[PIXELS])
        output = self._model[0].model(
            input_ids=batch.input_ids.to(device, non_blocking=later),
            attention_mask=None
            if batch.attention_mask is None
            else batch.attention_mask.to(device, non_blocking=later),
            position_ids=batch.position_ids.to(device, non_blocking=later),
            past_key_values=cache,
            use_cache=cache is not None,
            **others,
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
        """Preprocess inputs as `encode_query` and `encode_document` do, with the prompt of the dataset or the side."""
        return self._model.preprocess(inputs, prompt=self._prompt(side), task=side)

    def _prompt(self, side: Side) -> str | None:
        return self.prompts.get(side) or self._model.side_prompt(side)

    def _takes(self, name: str) -> bool:
        return taken_by(self._model[0], name)

    def _prefix(self, side: Side) -> SharedBeginning:
        """Return the beginning of the side's inputs.

        A batch may share fewer tokens than that, since the beginning of a text may merge with the prompt's last token,
        and none at all where a template puts images first.
        """
        with self._lock:  # batches may be prepared in several threads, and none before the check has passed
            if side not in self._prefixes:
                base, probes = self._model[0].model, ("a", "b")
                one, other = (laid_out(self._preprocess(side, [{"text": text}]), base) for text in probes)
                width = min(one.input_ids.shape[1], other.input_ids.shape[1])
                equal = one.input_ids[0, :width] == other.input_ids[0, :width]
                length = int(equal.int().cumprod(dim=0).sum())
                self._prefixes[side] = SharedBeginning.of(base, one, length, self._takes)
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
