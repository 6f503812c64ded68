"""What tests of losses share: pictures of noise, the gradients of a value, and whether two sets of them are equal."""

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


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest entry of each tensor that has one to speak of, and of all tensors for the rest."""
    assert found.keys() == expected.keys()
    overall = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max(), 1e-3 * overall)
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name
