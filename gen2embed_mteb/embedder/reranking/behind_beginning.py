"""Sequences that run behind a shared beginning, and what is read of their logits.

Only the positions that are read go through the output layer, which is the largest matrix of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gen2embed_mteb.embedder.passes.shared_beginning import Rows, SharedBeginning, split_features


@dataclass(frozen=True)
class Behind:
    """n sequences without the tokens that they share, padded on the right.

    Attributes:
        beginning: The tokens that they share.
        shared: How many of these tokens stand before each sequence.
        input_ids: (n, length) int64.
        mask: (n, shared + length) int64.
        positions: (n, length) int64, or (3, n, length).
        lengths: (n,) int64, the number of tokens of each sequence.
        others: Further features that the model takes, by name; those of tokens are (n, shared + length).
    """

    beginning: SharedBeginning
    shared: int
    input_ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    others: Mapping[str, torch.Tensor]

    @classmethod
    def of_texts(
        cls, row: Rows, beginning: SharedBeginning, tails: Sequence[Sequence[int]], takes: Callable[[str], bool]
    ) -> Behind:
        """Return sequences that end in tokens of text.

        Args:
            row: One sequence that begins with `beginning`, behind which it has text.
            beginning: The shared tokens.
            tails: n lists of tokens, none empty.
            takes: Returns whether the model takes a feature of a name.
        """
        shared, n = len(beginning), len(tails)
        lengths = torch.tensor([len(tail) for tail in tails])
        width = torch.arange(int(lengths.max()))
        input_ids = torch.zeros(n, len(width), dtype=torch.long)
        for target, tail in zip(input_ids, tails, strict=True):
            target[: len(tail)] = torch.tensor(list(tail))
        present = (width < lengths[:, None]).long()
        mask = torch.cat([torch.ones(n, shared, dtype=torch.long), present], dim=1)
        # A token of text stands one behind the token before it, on all axes.
        positions = row.positions[..., shared : shared + 1] + width
        per_token, _ = split_features(row, takes)
        others = {
            name: torch.cat(
                [value[:, :shared].expand(n, -1), value[:, shared : shared + 1].expand(n, len(width)) * present], dim=1
            )
            for name, value in per_token.items()
        }
        expanded = positions.expand(*positions.shape[:-2], n, -1)
        return cls(beginning, shared, input_ids, mask, expanded, lengths, others)

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        beginning: SharedBeginning,
        shared: int,
        images: Mapping[str, torch.Tensor],
        takes: Callable[[str], bool],
    ) -> Behind:
        """Return whole sequences without their first tokens.

        Args:
            rows: The sequences.
            beginning: Tokens that they begin with.
            shared: How many of them, at least 1.
            images: Features of the images behind the shared tokens.
            takes: Returns whether the model takes a feature of a name.
        """
        per_token, _ = split_features(rows, takes)
        ids, positions = rows.input_ids[:, shared:], rows.positions[..., shared:]
        return cls(beginning, shared, ids, rows.mask, positions, rows.lengths - shared, {**per_token, **images})

    def options(self, tokens: tuple[int, int]) -> torch.Tensor:
        """Return what the last position of each sequence says of two tokens.

        Returns:
            (n, 3) float32 on the CPU: their logits, and the logarithm of the sum over all tokens.
        """
        kept, place = torch.unique(self.lengths - 1, return_inverse=True)
        logits = self._logits(kept)
        read = logits[torch.arange(len(logits)), place.to(logits.device)].float()
        return torch.cat([read[:, list(tokens)], read.logsumexp(dim=-1, keepdim=True)], dim=1).cpu()

    def log_probabilities(self, first: int) -> torch.Tensor:
        """Return the log-probability of each sequence's tokens from a position on, summed.

        Args:
            first: The position of the first of them in `input_ids`, at least 1.

        Returns:
            (n,) float32 on the CPU.
        """
        logits = self._logits(torch.arange(first - 1, self.input_ids.shape[1] - 1))
        sums = []
        for row, ids, length in zip(logits, self.input_ids, self.lengths.tolist(), strict=True):
            steps = row[: length - first].float().log_softmax(dim=-1)
            sums.append(steps.gather(1, ids[first:length, None].to(row.device)).sum())
        return torch.stack(sums).cpu()

    def _logits(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the logits of some positions: (n, positions, vocabulary)."""
        model = self.beginning.model
        device = model.device
        output = model(
            input_ids=self.input_ids.to(device),
            attention_mask=None if bool(self.mask.all()) else self.mask.to(device),
            position_ids=self.positions.to(device),
            past_key_values=self.beginning.repeated(self.shared, len(self.input_ids)),
            use_cache=True,
            logits_to_keep=kept.to(device),
            **{name: value.to(device) for name, value in self.others.items()},
        )
        logits: torch.Tensor = output.logits
        return logits


def in_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Return the numbers of sequences in batches of like lengths, the longest first.

    Args:
        lengths: n lengths.
        batch_tokens: The most tokens of a batch, padding included; a longer sequence is a batch alone.
    """
    batches: list[list[int]] = []
    left = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if left == 0:
            batches.append([])
            left = max(1, batch_tokens // max(1, lengths[number]))
        batches[-1].append(number)
        left -= 1
    return batches


def in_order(batches: Sequence[Sequence[int]], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rows that were computed in batches, in the order of their numbers."""
    numbers = torch.tensor([number for batch in batches for number in batch])
    found = torch.cat(list(parts))
    out = torch.empty_like(found)
    out[numbers] = found
    return out
