"""The framing `likelihood`: how much more probable a query makes the text of a candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def with_answers(features: dict[str, Any], answers: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Return the features of conversations with an answer behind each one.

    Args:
        features: What a processor made of n conversations, padded on the left: tensors of the shape (n, tokens) of
            "input_ids" hold one number per token, other tensors stay as they are.
        answers: n lists of tokens, none empty.
        pad: The token to pad with.

    Returns:
        The same features, padded on the left; "logits_to_keep" is set so that all answers have their logits.
    """
    ids: torch.Tensor = features["input_ids"]
    mask: torch.Tensor = features["attention_mask"]
    lengths = mask.sum(dim=1).tolist()
    width = max(length + len(answer) for length, answer in zip(lengths, answers, strict=True))
    found = dict(features)
    for name, value in features.items():
        if not isinstance(value, torch.Tensor) or value.shape != ids.shape:
            continue
        rows = torch.full((len(value), width), pad if name == "input_ids" else 0, dtype=value.dtype)
        for row, given, length, answer in zip(rows, value, lengths, answers, strict=True):
            row[width - len(answer) - length : width - len(answer)] = given[len(given) - length :]
            if name == "input_ids":
                row[width - len(answer) :] = torch.tensor(list(answer))
            elif name == "attention_mask":
                row[width - len(answer) :] = 1
        found[name] = rows
    found["logits_to_keep"] = max(map(len, answers)) + 1
    return found


def log_probabilities(logits: torch.Tensor, answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the log-probability of each answer, summed over its tokens.

    Args:
        logits: (n, positions, vocabulary), of the last positions; the last one stands behind the answer.
        answers: n lists of tokens, each shorter than `positions`.

    Returns:
        (n,) float32.
    """
    sums = []
    for row, answer in zip(logits, answers, strict=True):
        steps = row[-len(answer) - 1 : -1].float().log_softmax(dim=-1)
        sums.append(steps.gather(1, torch.tensor(list(answer), device=row.device)[:, None]).sum())
    return torch.stack(sums)
