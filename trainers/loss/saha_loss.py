"""`SahaLoss`: sentence-transformers' cached InfoNCE at the paper's temperature, known positives masked.

Negatives of a query are all other candidates of the batch, on all devices. Clusters hold no positive twice, but two
clusters of a batch may: with labels ("dog", "dog") that is the rule, and each such pair would be pushed apart. Here a
candidate that equals a query's own positive is not its negative, nor is the positive of an equal query, nor what the
data states to be a further positive (`no_negatives.py`). The stock losses cannot do this: they know vectors only.

The two passes of the cached loss share what a frozen vision tower computes (`image_reuse.py`); the rows of a
mini-batch may share the tokens that they begin with (`prefix_sharing.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import RandContext
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.util import all_gather, all_gather_with_grad, cos_sim, get_rank, get_world_size
from torch import Tensor

from trainers.batches.image_rows import NUM_ROWS, minibatch
from trainers.batches.stated_facts import STATED
from trainers.loss.image_reuse import has_frozen_vision, reusing_image_features
from trainers.loss.no_negatives import Facts
from trainers.loss.prefix_sharing import can_share_prefix, gains_from_sharing, sharing_prefix

TEMPERATURE = 0.02
"""The paper's τ (Sec. IV-A); the loss multiplies by its inverse, `scale`."""


def float32_cosine(queries: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarities in float32, whatever the vectors and the autocast context are.

    bfloat16 has steps of 2^-8 just below 1: at a scale of 50, an error of 0.1 in the exponent.

    Args:
        queries: (n, d).
        candidates: (m, d).

    Returns:
        (n, m) float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return cos_sim(queries.float(), candidates.float())


class SahaLoss(CachedMultipleNegativesRankingLoss):
    """InfoNCE over whole batches with cached gradients (paper, Eq. 2 in Sec. III-C).

    Takes (query, positive) and (query, positive, negative_1, …, negative_k); every negative is one of all queries of
    the batch. With `SahaTrainer` a row may have fewer negatives than others: its cell is then None or has no text and
    no image, and counts for nothing. Another trainer's collator can say so by a feature `absent` of the column, (B,)
    bool.

    Args:
        model: The model that is trained.
        scale: 1 / τ.
        mini_batch_size: Inputs whose activations are kept at a time.
        mini_batch_num_tokens: If set, mini-batches are packed by tokens instead.
        gather_across_devices: Whether candidates of all processes are negatives; without effect on one.
        mask_equal_positives: Whether candidates that equal a query's positive, or are the positive of an equal query,
            are left out of its negatives.
        reuse_image_features: Whether the second pass takes image tokens from the first, where the vision tower is
            frozen. They grow with the batch: for Qwen2-VL-2B in bfloat16 by a sixth of the pixels that it holds.
        share_prefix: Whether tokens that all rows of a mini-batch begin with are run once, where the model allows it;
            None: on a CPU, without dropout.
        show_progress_bar: Show one a step.
    """

    compares_candidates = True
    """Whether what is no negative is left out; distillation has no negatives."""

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        scale: float = 1 / TEMPERATURE,
        mini_batch_size: int = 16,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = True,
        mask_equal_positives: bool = True,
        reuse_image_features: bool = True,
        share_prefix: bool | None = None,
        show_progress_bar: bool = False,
    ) -> None:
        super().__init__(
            model,
            scale=scale,
            similarity_fct=float32_cosine,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            show_progress_bar=show_progress_bar,
        )
        self.mask_equal_positives = mask_equal_positives
        self.reuse_image_features = reuse_image_features
        self.share_prefix = share_prefix

    @property
    def gather_across_devices(self) -> bool:
        """Whether candidates of several processes are gathered."""
        return self.loss.gather_across_devices and get_world_size() > 1

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch.

        Args:
            sentence_features: One dict of features a column, B rows each.
            labels: Not used.

        Returns:
            A scalar; its backward pass runs the model again, mini-batch by mini-batch.
        """
        given = list(sentence_features)
        facts: Any = Facts.of(given, by_content=self.mask_equal_positives)
        # sentence-transformers 6.2 (`CachedLossMixin.forward_cached`) hands its second argument, which InfoNCE has no
        # use of, to `calculate_loss` as it is: the one way in which something of a batch reaches both of its calls.
        return super().forward(self.columns_of(given), facts)

    def columns_of(self, sentence_features: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the columns of a batch, each with what its mini-batches need to save work."""
        inner = getattr(extract_model_from_parallel(self.model)[0], "model", None)
        features = [
            {name: value for name, value in column.items() if name not in STATED} for column in sentence_features
        ]
        if inner is not None:
            savings = {
                "frozen_vision": self.reuse_image_features and has_frozen_vision(inner),
                "prefix": self._shares_prefix(inner),
            }
            features = [_Column(column, inner, **savings) for column in features]
        return features

    def calculate_loss(self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False) -> Tensor:
        """Return InfoNCE of a batch (Eq. 2), computed `mini_batch_size` queries at a time; the base class calls it.

        The operations are those of the base class in their order, so that where nothing is left out the bits are too.

        Args:
            reps: For each column its embeddings, mini-batch by mini-batch.
            labels: What is known of this process's inputs, `Facts`; None masks nothing.
            with_backward: Whether gradients are propagated to `reps`.

        Returns:
            A scalar.
        """
        queries, columns = torch.cat(reps[0]), [torch.cat(column) for column in reps[1:]]
        first, facts = 0, labels
        gathered = None if facts is None else facts.candidates
        if self.gather_across_devices:
            columns = [all_gather_with_grad(column) for column in columns]
            gathered = None if gathered is None else all_gather(gathered)
            first = get_rank() * len(queries)
        candidates = torch.cat(columns)  # all positives, then all first negatives, …
        losses: list[Tensor] = []
        for rows in torch.arange(len(queries), device=queries.device).split(self.mini_batch_size):
            own = rows + first
            cosines = self.similarity_fct(queries[rows], candidates)
            if facts is not None:
                cosines = cosines.masked_fill(facts.left_out(gathered, rows, own), -torch.inf)
            part = self.per_query(cosines, own).mean() * len(rows) / len(queries)
            if with_backward:
                part.backward()
                part = part.detach()
            losses.append(part)
        return sum(losses[1:], losses[0])

    def per_query(self, cosines: Tensor, own: Tensor) -> Tensor:
        """Return the loss of n queries.

        Args:
            cosines: (n, m) float32 similarities to all candidates of the batch, -inf for those that do not count.
            own: (n,) int64, which candidate is the query's positive.

        Returns:
            (n,) float32.
        """
        scores = cosines * self.scale
        positive = scores[torch.arange(len(own), device=own.device), own]
        return -(positive - torch.logsumexp(scores, dim=1))

    def embed_minibatch(
        self, sentence_feature: dict[str, Any], begin: int, end: int, with_grad: bool, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Embed rows `begin` to `end` of a column; called by the base class, twice where gradients are wanted."""
        keep = torch.is_grad_enabled() and not with_grad
        column = sentence_feature if isinstance(sentence_feature, _Column) else None
        with column.saving_work(begin, keep=keep) if column is not None else nullcontext():
            if any(name.endswith(NUM_ROWS) for name in sentence_feature):
                return self._embed_cut(minibatch(sentence_feature, begin, end), with_grad, *args, **kwargs)
            return super().embed_minibatch(sentence_feature, begin, end, with_grad, *args, **kwargs)

    def _embed_cut(
        self,
        features: dict[str, Any],
        with_grad: bool,
        copy_random_state: bool,
        random_state: RandContext | None = None,
    ) -> tuple[Tensor, RandContext | None]:
        """Embed the features of a mini-batch as the base class does, which would cut them again."""
        with random_state or nullcontext(), nullcontext() if with_grad else torch.no_grad():
            state = RandContext(*features.values()) if copy_random_state else None
            return self.model(features)["sentence_embedding"], state

    def _shares_prefix(self, model: torch.nn.Module) -> bool:
        if self.share_prefix is False or not can_share_prefix(model):
            return False
        return bool(self.share_prefix) or gains_from_sharing(model)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for model cards."""
        return {**super().get_config_dict(), "mask_equal_positives": self.mask_equal_positives}


def reads_facts(loss: Any) -> bool:
    """Say whether a loss, or the one that it is around, knows the features of `stated_facts.py`.

    Args:
        loss: Any loss.
    """
    inner = getattr(loss, "loss", None)
    return any(isinstance(one, SahaLoss) and one.compares_candidates for one in (loss, inner))


class _Column(dict[str, Any]):
    """The features of a column, and how its mini-batches save work; it lives as long as its batch."""

    def __init__(self, features: dict[str, Any], model: torch.nn.Module, *, frozen_vision: bool, prefix: bool) -> None:
        """Keep what `forward` found out about the model, once a step."""
        super().__init__(features)
        self._model, self._frozen_vision, self._prefix = model, frozen_vision, prefix
        self._image_features: dict[int, Any] = {}

    @contextmanager
    def saving_work(self, begin: int, *, keep: bool) -> Iterator[None]:
        """For one pass of the mini-batch that begins with row `begin`; `keep` if another will follow."""
        with ExitStack() as stack:
            if self._frozen_vision:
                stack.enter_context(reusing_image_features(self._model, self._image_features, begin, keep=keep))
            if self._prefix:
                stack.enter_context(sharing_prefix(self._model))
            yield
