"""Which cases of a long list the gate runs, and which only `make test-all`.

Families of one kind take the same way through the code. The sample has one of each kind: three-dimensional positions, a
template written by hand, sliding windows and types of tokens, recurrent layers, tiles of images, and text alone.
"""

from collections.abc import Iterable
from typing import Any

import pytest
from tiny_any import ANY
from tiny_torchvision import TORCHVISION

FAMILIES = ("qwen2_vl", "llava_next", "gemma3", "qwen3_5", "idefics3", "llama")
SELDOM = frozenset({"qwen2_5_vl", *ANY, *TORCHVISION} - {*FAMILIES, "qwen3_vl"})
"""The families whose cases only `make test-all` runs, in every test; qwen3_vl keeps a template of its own."""


def sample_of(cases: Iterable[Any], sample: Iterable[Any] = FAMILIES) -> list[Any]:
    """Return all cases for `pytest.mark.parametrize`; those that are not in the sample are marked as exhaustive."""
    kept = set(sample)
    return [case if case in kept else pytest.param(*_values(case), marks=pytest.mark.exhaustive) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
