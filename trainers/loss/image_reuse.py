"""What a frozen vision tower makes of an image, computed once a training step.

A cached loss runs every mini-batch twice: first for its embeddings, then for its gradients. The recipe trains the
language model alone, so the second pass asks the vision tower for what it has computed before; on large images that is
the longer half of a pass. Here the first pass keeps it: an image's tokens in the language model's width, which is less
than the pixels that the batch holds anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.utils import ModelOutput

from trainers.loss.dropout import has_dropout

# What no language model is given: the states before the projection, which are larger than the tokens.
_NOT_KEPT = ("last_hidden_state", "hidden_states", "attentions")


def has_frozen_vision(model: nn.Module) -> bool:
    """Return whether images become the same tokens in both passes, whatever the step trains.

    Args:
        model: The inner model of a multimodal family, as `AutoModel` loads it.

    Returns:
        True if it has a vision tower, all that is trained lies in its language model, and nothing else draws random
        numbers, which the second pass would have to draw likewise.
    """
    if not hasattr(model, "get_image_features"):
        return False
    decoder = model.get_decoder()
    inside = set(map(id, decoder.modules()))
    others = [module for module in model.modules() if id(module) not in inside]
    trained = any(weight.requires_grad for module in others for weight in module.parameters(recurse=False))
    return not trained and not has_dropout(others, getattr(model.config, "vision_config", None))


@contextmanager
def reusing_image_features(model: nn.Module, kept: dict[int, Any], number: int, *, keep: bool) -> Iterator[None]:
    """Let a forward pass take its image tokens from an earlier one.

    Args:
        model: A model with `has_frozen_vision`.
        kept: Image tokens by the number of their mini-batch. What is taken is removed.
        number: The mini-batch that is run.
        keep: Whether image tokens that have to be computed are put into `kept`.
    """
    compute = model.get_image_features

    def reuse(*args: Any, **kwargs: Any) -> ModelOutput:
        if number in kept:
            return kept.pop(number)
        output = compute(*args, **kwargs)
        if keep:
            kept[number] = type(output)(**{name: output[name] for name in output if name not in _NOT_KEPT})
        return output

    model.get_image_features = reuse
    try:
        yield
    finally:
        del model.get_image_features  # the class's own shows again
