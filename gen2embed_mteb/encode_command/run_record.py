"""What a driver says of its run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """What one process did.

    Attributes:
        num_parts: The number of parts of the input.
        checked: The numbers of the parts whose files this process wrote or compared with their digests.
        num_encoded: The number of inputs that this process passed to the model.
        num_rows: The number of rows of the parts that this process looked after.
        seconds: How long that took.
    """

    num_parts: int
    checked: frozenset[int]
    num_encoded: int
    num_rows: int
    seconds: float
