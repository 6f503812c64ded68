"""What tests of losses share: pictures of noise, and the gradients of a value."""

import numpy as np
import torch
from PIL import Image


def picture(seed: int) -> Image.Image:
    """A picture of its own for each seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def gradients(model: torch.nn.Module, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of `value`, by the name of the weight."""
    model.zero_grad()
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
