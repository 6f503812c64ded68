"""The methods that Algorithm 1 and the baselines need of a search, exact or approximate, made now or before."""

from __future__ import annotations

from typing import Protocol

import torch

from trainers.saha.scores import Floats, Integers, Vectors


class Search(Protocol):
    """Finds the candidates most similar to each query; see `ExactSearch` for the meaning of its members."""

    candidates: torch.Tensor
    devices: list[torch.device]
    error: float

    def top_k(self, queries: Vectors, k: int) -> tuple[Integers, Floats]:
        """Find the k candidates most similar to each query, in order."""

    def pools(self, queries: Vectors, k: int, exclude: Integers | None = None) -> tuple[list[Integers], list[Floats]]:
        """Find the k candidates most similar to each query, without one that is left out."""
