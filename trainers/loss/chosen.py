"""The loss that `gen2embed train` is asked for."""

from __future__ import annotations

from typing import Any

import torch

from gen2embed_mteb.embedder.model import Gen2Embed
from trainers.config import TrainConfig
from trainers.loss.matryoshka import at_widths
from trainers.loss.saha_loss import SahaLoss
from trainers.loss.unime_loss import UnimeLoss


def loss_of(config: TrainConfig, model: Gen2Embed, *, gather_across_devices: bool) -> torch.nn.Module:
    """Return the loss.

    Args:
        config: The settings.
        model: The model that is trained.
        gather_across_devices: Whether candidates of all processes are negatives.
    """
    settings: dict[str, Any] = {
        "scale": 1 / config.temperature,
        "mini_batch_size": config.sub_batch_size,
        "mask_equal_positives": config.mask_equal_positives and config.loss != "in-batch",
        "gather_across_devices": gather_across_devices,
    }
    own: dict[str, Any] = {
        "beta": config.beta,
        "variant": config.unime_variant,
        "num_hard_negatives": config.num_hard_negatives,
    }
    loss: SahaLoss
    if config.loss == "unime":
        loss = UnimeLoss(model, **settings, **{name: value for name, value in own.items() if value is not None})
    else:
        loss = SahaLoss(model, **settings)
    return at_widths(model, loss, config.matryoshka_dims, config.matryoshka_weights)
