"""Which candidates of a batch are no negatives of a query.

Four kinds, the first two found by content (`content_hash.py`), the others stated by the data (`stated_facts.py`):

1. A candidate that equals the query's own positive.
2. The positive of another row whose query is the same.
3. A candidate that the data names among the query's positives, in this row or in another.
4. The placeholder of a negative that a row does not have: it is nobody's negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.batches.stated_facts import ABSENT, CANDIDATE_NUMBER, KNOWN_POSITIVES, STATED
from trainers.loss.content_hash import content_digests


@dataclass(frozen=True)
class Facts:
    """What is known of the inputs of a batch, on one process.

    Attributes:
        candidates: (B, columns without the query, 4) int64: the candidate's digest, the digest of its row's query, its
            number, and 1 where it is a placeholder. All of them are gathered from all processes.
        known: (B, P) int64, the numbers of each query's positives; None if the data states none.
        by_content: Whether digests were made and count.
    """

    candidates: Tensor
    known: Tensor | None = None
    by_content: bool = True

    @classmethod
    def of(cls, features: Sequence[dict[str, Any]], *, by_content: bool) -> Facts | None:
        """Read the facts of a batch.

        Args:
            features: One dict of features a column, the queries first.
            by_content: Whether equal inputs are told by their content.

        Returns:
            The facts; None if there is nothing to leave out.

        Raises:
            Gen2EmbedError: A query or a positive is missing.
        """
        stated = any(not STATED.isdisjoint(column) for column in features)
        if not (by_content or stated):
            return None
        for column in features[:2]:
            if ABSENT in column and bool(column[ABSENT].any()):
                row = int(column[ABSENT].int().argmax())
                raise Gen2EmbedError(
                    f"row {row} of a batch has no {'query' if column is features[0] else 'positive'}; only negatives "
                    "may be missing, so leave the row out of the dataset"
                )
        digests = [_digests(column, by_content) for column in features]
        rows = []
        for column, digest in zip(features[1:], digests[1:], strict=True):
            number = column.get(CANDIDATE_NUMBER, torch.full_like(digest, -1)).to(digest.device)
            absent = column.get(ABSENT, torch.zeros_like(digest)).to(digest.device).long()
            rows.append(torch.stack([digest, digests[0], number, absent], dim=1))
        known = features[0].get(KNOWN_POSITIVES)
        known = None if known is None else known.to(digests[0].device)
        return cls(torch.stack(rows, dim=1), known, by_content)

    def left_out(self, gathered: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Return which candidates do not count for some queries.

        Args:
            gathered: (B', columns, 4) what `candidates` is on all processes together.
            rows: (n,) int64, which queries of this process.
            own: (n,) int64, which candidate is the positive of each.

        Returns:
            (n, B' columns) bool; never the query's own positive. Candidates are in the order of the loss: all
            positives, then all first negatives, …
        """
        digests, queries, numbers, absent = gathered.transpose(0, 1).flatten(0, 1).unbind(dim=1)
        found = absent.bool().expand(len(rows), -1).clone()
        if self.by_content:
            found |= digests[own, None] == digests
            found[:, : len(gathered)] |= queries[own, None] == queries[: len(gathered)]
        if self.known is not None:
            for known in self.known[rows].unbind(dim=1):
                found |= known[:, None] == numbers
        found[torch.arange(len(rows), device=rows.device), own] = False
        return found


def _digests(column: dict[str, Any], by_content: bool) -> Tensor:
    features = {name: value for name, value in column.items() if name not in STATED}
    if by_content:
        return content_digests(features)
    some = next(value for value in features.values() if isinstance(value, Tensor))
    rows = next((column[name] for name in STATED if name in column), features.get("input_ids", some))
    return torch.zeros(len(rows), dtype=torch.long, device=some.device)
