"""Number the rows of a batch by content, so that equal candidates are known as equal.

Vectors do not tell: padding and batch change their last bits. Here the token ids and the pixels of a row, as the model
gets them, become one 64-bit number. That needs no column in the data, survives gathering from several processes, and
finds the same image under two paths. It costs one pass over the features, without the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.batches.image_rows import image_features, minibatch

_FOLD = 1024
_MIX = 0x2545F4914F6CDD1D


def content_digests(features: dict[str, Any]) -> Tensor:
    """Return a number for each row of a column: of its tokens, and of its images as the processor left them.

    Args:
        features: What `preprocess` returned for B inputs.

    Returns:
        (B,) int64, equal for equal rows whatever the padding; different rows agree with a probability of about 2^-60.

    Raises:
        ValueError: The rows are not padded token ids: the model flattens its batches, or has no tokens.
    """
    if not {"input_ids", "attention_mask"} <= features.keys():
        raise Gen2EmbedError(
            f"equal positives are told by input_ids and attention_mask, but there are {', '.join(features)}; load the "
            "model with unpad_inputs=False, or pass mask_equal_positives=False"
        )
    tokens, mask = features["input_ids"], features["attention_mask"].bool()
    keys = torch.randint(-(2**63), 2**63 - 1, (_FOLD,), generator=torch.Generator().manual_seed(0)) | 1
    keys = keys.to(tokens.device)
    # Moved to the left end, so that padding is trailing zeros; token id 0 is a token.
    moved = torch.zeros_like(tokens)
    rows, _ = mask.nonzero(as_tuple=True)
    moved[rows, (mask.cumsum(dim=1) - 1)[mask]] = tokens[mask] + 1
    parts = [_fold(moved, keys)]
    names = image_features(features)
    if names:
        cuts = [minibatch(features, row, row + 1) for row in range(len(tokens))]
        nothing = torch.zeros_like(keys[0])
        for name in names:
            parts.append(torch.stack([_fold(_bits(cut[name]), keys) if name in cut else nothing for cut in cuts]))
    return _fold(torch.stack(parts, dim=1), keys)


def _bits(values: Tensor) -> Tensor:
    """Return the bit patterns of a tensor, flat, as integers."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(width).flatten()


def _fold(values: Tensor, keys: Tensor) -> Tensor:
    """Hash the last axis of integers, at most 2^30 of them: three keyed sums modulo 2^64, mixed after each.

    Trailing zeros do not count: some processors pad a batch's images with zeros to the largest.

    Args:
        values: (…, n) integers.
        keys: (`_FOLD`,) int64, odd.

    Returns:
        (…) int64.
    """
    for _ in range(3):
        values = torch.nn.functional.pad(values, (0, -values.shape[-1] % _FOLD)).unflatten(-1, (-1, _FOLD))
        values = (values * keys).sum(dim=-1)
        values = (values ^ (values >> 29 & 2**35 - 1)) * _MIX
    return values[..., 0]
