"""Whether a part of a model draws random numbers in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def has_dropout(modules: Iterable[nn.Module], config: Any) -> bool:
    """Return whether any of these modules drops anything while it trains.

    Args:
        modules: The modules of the part, an adapter's among them.
        config: The part's own configuration, whose `attention_dropout` is no module; None if it has none.
    """
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    return layers or bool(getattr(config, "attention_dropout", 0.0))
