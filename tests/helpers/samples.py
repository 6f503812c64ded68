"""Which cases of a long list the gate runs, and which only `make test-all`.

Families of one kind take the same way through the code. The sample has one of each kind: three-dimensional positions, a
template written by hand, sliding windows and types of tokens, recurrent layers, tiles of images, and text alone.
"""

from collections.abc import Iterable
from typing import Any

import pytest

FAMILIES = ("qwen2_vl", "llava_next", "gemma3", "qwen3_5", "idefics3", "llama")


def sample_of(cases: Iterable[str], sample: Iterable[str] = FAMILIES) -> list[Any]:
    """Return all cases for `pytest.mark.parametrize`; those that are not in the sample are marked as exhaustive."""
    kept = set(sample)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
