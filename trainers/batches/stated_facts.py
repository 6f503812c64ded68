"""What training data says of its rows beyond the cells: other positives of a query, and negatives that a row lacks.

A loss must know both, and the stock collator passes on nothing but what becomes of cells. So `training_dataset` puts
two numbers into cells, where the data has several positives:

    a query's cell      `known_positives`: the numbers of all candidates that are its positives
    a candidate's cell  `candidate_number`: its number; equal candidates have equal numbers

A row with fewer explicit negatives than others has an empty cell: `{"text": None, "image": []}`, or None. `CellReader`
turns all of this into features of the column, one row per cell, and `SahaLoss` takes them out again:

    known_positives    (B, P) int64, `NOBODY` where a query has fewer than P
    candidate_number   (B,) int64, `UNNUMBERED` where the data states none
    absent             (B,) bool; the row's vector is that of an empty text, and counts for nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KNOWN_POSITIVES, CANDIDATE_NUMBER, ABSENT = "known_positives", "candidate_number", "absent"
STATED = frozenset({KNOWN_POSITIVES, CANDIDATE_NUMBER, ABSENT})
NOBODY, UNNUMBERED = -2, -1


def without_facts(cell: Any) -> Any:
    """Return a cell without what is stated beside text and image.

    Args:
        cell: Any cell.
    """
    if isinstance(cell, Mapping) and not STATED.isdisjoint(cell):
        return {key: value for key, value in cell.items() if key not in STATED}
    return cell


def is_absent(cell: Any) -> bool:
    """Say whether a cell stands for a negative that its row does not have.

    Args:
        cell: Any cell; an empty text is a text.
    """
    if not isinstance(cell, Mapping):
        return cell is None
    own = without_facts(cell)
    return all(value is None or (isinstance(value, list | tuple) and not any(value)) for value in own.values())


def facts_of(cells: Sequence[Any]) -> dict[str, Tensor]:
    """Return the features that say what a column's cells state; every column gets all three.

    Args:
        cells: The B cells of a column.
    """
    known = [list(cell.get(KNOWN_POSITIVES) or ()) if isinstance(cell, Mapping) else [] for cell in cells]
    width = max(1, max(map(len, known), default=1))
    numbers = [cell.get(CANDIDATE_NUMBER) if isinstance(cell, Mapping) else None for cell in cells]
    return {
        KNOWN_POSITIVES: torch.tensor([[*one, *[NOBODY] * (width - len(one))] for one in known], dtype=torch.long),
        CANDIDATE_NUMBER: torch.tensor([UNNUMBERED if one is None else one for one in numbers], dtype=torch.long),
        ABSENT: torch.tensor([is_absent(cell) for cell in cells]),
    }
