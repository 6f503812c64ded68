"""`UnimeLoss`: InfoNCE against the k hardest negatives of each query in the batch (UniME, stage 2).

After arXiv 2504.17432, "hard negative enhanced instruction tuning". For query i, with similarities s to all candidates
of the batch, on all devices:

1. Candidates with s_ij > s_ii + β are dropped: they are more similar than the positive, so probably right, though
   nobody labelled them so (false negatives).
2. Of the others, the k most similar are its negatives.
3. Its loss is InfoNCE of the positive against these k, at the temperature τ.

Nothing is mined before training: the choice is made anew in each step, by the model as it is then. Gradients flow
through the chosen similarities, not through the choice.

Cost: beside that of `SahaLoss`, one top-k per row of the matrix of similarities.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import softplus

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_number
from trainers.loss.saha_loss import TEMPERATURE, SahaLoss

Variant = Literal["paper", "official"]
VARIANTS: tuple[Variant, ...] = ("paper", "official")
BETA, NUM_HARD_NEGATIVES = 0.1, 8
"""The paper's β and k (its Tables 4 and 5)."""
_NEVER = -1e4
"""A similarity so low that a candidate with it has no weight."""


class UnimeLoss(SahaLoss):
    """InfoNCE against the k hardest negatives of the batch, without false negatives, with cached gradients.

    Takes (query, positive) and (query, positive, negative_1, …); further negatives are candidates like the others.

    A query may have fewer than k negatives left, in a small batch or where β drops most of them. `variant` says what
    then happens:

    - `paper`: those that are left are repeated, the most similar first, until there are k. If none is left, the query
      has nothing to be told from: its loss is 0, and it has no gradient. It still counts in the mean.
    - `official`: as the published code does, the rest is filled up with what was to be left out: dropped candidates,
      and the positive itself as its own negative, in the order of `torch.topk`. The batch needs k candidates or more.

    Args:
        model: The model that is trained.
        beta: β, how much more similar than the positive a negative may be.
        num_hard_negatives: k.
        variant: What is done about a query with fewer than k negatives left.
        scale: 1 / τ; the paper's τ is 0.02.
        mask_equal_positives: Whether candidates that equal a query's positive are dropped, too. β alone keeps them, as
            they are no more similar than the positive. The paper does not drop them.
        options: Further arguments of `SahaLoss`.

    Raises:
        Gen2EmbedError: β is not finite, k is below 1, or the variant is unknown.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        beta: float = BETA,
        num_hard_negatives: int = NUM_HARD_NEGATIVES,
        variant: Variant = "paper",
        scale: float = 1 / TEMPERATURE,
        mask_equal_positives: bool = True,
        **options: Any,
    ) -> None:
        check_number("beta", beta)
        check_number("num_hard_negatives", num_hard_negatives, 1)
        if variant not in VARIANTS:
            raise Gen2EmbedError(f"variant is {variant!r}; known: {', '.join(VARIANTS)}")
        super().__init__(model, scale=scale, mask_equal_positives=mask_equal_positives, **options)
        self.beta = beta
        self.num_hard_negatives = num_hard_negatives
        self.variant = variant

    def per_query(self, cosines: Tensor, own: Tensor) -> Tensor:
        """Return the loss of n queries; arguments as for `SahaLoss`."""
        positive = cosines.gather(1, own[:, None])
        negatives, counts = self.hard_negatives(cosines, own)
        chosen = cosines.gather(1, negatives)
        if counts is not None:
            chosen = chosen.masked_fill(counts[:, None] == 0, -torch.inf)
        # log(1 + Σ e^(n - p)): where the positive is far ahead, softmax - 1 would lose the gradient's last digits. The
        # bound stands for -inf, of which logsumexp has no gradient.
        chosen = chosen.clamp(min=_NEVER) * self.scale
        return softplus(torch.logsumexp(chosen, dim=1) - positive[:, 0] * self.scale)

    @torch.no_grad()
    def hard_negatives(self, cosines: Tensor, own: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return which candidates are the negatives of n queries.

        Args:
            cosines: (n, m) float32 similarities, -inf for candidates that do not count.
            own: (n,) int64, which candidate is the query's positive.

        Returns:
            (n, k) int64 columns of `cosines`, the most similar first; and (n,) int64, how many different ones were left
            to choose from, at most k. It is None for the published code, which takes k in any case.

        Raises:
            Gen2EmbedError: The published code is asked for, and the batch has fewer than k candidates.
        """
        k, num_candidates = self.num_hard_negatives, cosines.shape[1]
        dropped = cosines > cosines.gather(1, own[:, None]) + self.beta
        left = cosines.masked_fill(dropped, -torch.inf).scatter(1, own[:, None], -torch.inf)
        if self.variant == "official":
            if num_candidates < k:
                raise Gen2EmbedError(
                    f"num_hard_negatives is {k}, but the batch has {num_candidates} candidates, of which the published "
                    "code would choose; pass a larger batch, a smaller num_hard_negatives, or variant='paper'"
                )
            return left.topk(k, dim=1).indices, None
        similarities, best = left.topk(min(k, num_candidates), dim=1)
        counts = (similarities > -torch.inf).sum(dim=1)
        places = torch.arange(k, device=own.device) % counts.clamp(min=1)[:, None]
        return best.gather(1, places), counts

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for model cards."""
        own = {"beta": self.beta, "num_hard_negatives": self.num_hard_negatives, "variant": self.variant}
        return {**super().get_config_dict(), **own}
