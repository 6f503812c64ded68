"""Matryoshka training: the loss at several widths, so that the first dimensions of a vector are of use alone.

sentence-transformers' `MatryoshkaLoss` fits around our losses as they are. For a cached loss it replaces
`calculate_loss`, the second of three steps (`base/losses/gradcache.py`):

1. The vectors of a batch are computed once, in full width, mini-batch by mini-batch, with what `SahaLoss` saves.
2. For each width they are cut and brought to length 1, the loss is computed of them, and its gradients, times the
   width's weight, are added up in the full vectors.
3. The mini-batches are run again, with these gradients.

So everything that `calculate_loss` decides, it decides for each width by that width's own similarities: the softmax,
UniME's k hardest negatives, and what its beta drops. What counts as an equal positive is read from the inputs, and is
the same in all widths.

Cost: one more matrix of similarities per width and step. The model is run as often as without.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_number


def check_widths(dims: Sequence[int], weights: Sequence[float] = (), width: int | None = None) -> None:
    """Check the widths of Matryoshka training; no model is needed.

    Args:
        dims: The widths.
        weights: Their weights; empty: 1 for each.
        width: The number of dimensions of the model; `None`: not known.

    Raises:
        Gen2EmbedError: They are not whole numbers above 0 in descending order, one is larger than the model's width, or
            the weights do not fit.
    """
    shown = " ".join(map(str, dims))
    if weights and not dims:
        raise Gen2EmbedError("matryoshka_weights without matryoshka_dims would have no effect; pass both")
    for dim in dims:
        if dim < 1:
            raise Gen2EmbedError(f"matryoshka_dims has {dim}; pass numbers of dimensions, 1 or more")
    for larger, smaller in itertools.pairwise(dims):
        if smaller >= larger:
            raise Gen2EmbedError(
                f"matryoshka_dims is {shown}: {smaller} comes after {larger}; pass each once, the largest first"
            )
    if width is not None and dims and dims[0] > width:
        raise Gen2EmbedError(
            f"matryoshka_dims has {dims[0]}, but vectors of the model have {width} dimensions; pass {width} or fewer"
        )
    if weights and len(weights) != len(dims):
        raise Gen2EmbedError(
            f"matryoshka_weights has {len(weights)} numbers and matryoshka_dims {len(dims)}; pass one for each"
        )
    for weight in weights:
        check_number("matryoshka_weights", weight)
        if weight <= 0:
            raise Gen2EmbedError(f"matryoshka_weights has {weight}; pass numbers above 0, or leave the dimension out")


def at_widths(model: Any, loss: torch.nn.Module, dims: Sequence[int], weights: Sequence[float] = ()) -> torch.nn.Module:
    """Return sentence-transformers' Matryoshka loss around a loss; the loss itself if there are no widths.

    Args:
        model: The model that is trained.
        loss: `SahaLoss`, `UnimeLoss` or any other; it must not be used by itself afterwards.
        dims: The widths, descending.
        weights: Their weights; empty: 1 for each.

    Raises:
        Gen2EmbedError: As for `check_widths`.
    """
    check_widths(dims, weights, model.get_embedding_dimension())
    if not dims:
        return loss
    return MatryoshkaLoss(model, loss, list(dims), list(weights) or None)
