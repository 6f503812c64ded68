"""The beginning that all rows of a mini-batch have in common, run once through the decoder, with its gradients.

Under the two-level prompt every input of a side begins with the same system turn, and the inputs of one data set often
with the same instruction: in a mini-batch of labels or captions, most of the tokens. No token of a decoder looks ahead,
so the keys and values of that beginning are the same in every row: they are computed for one row and expanded, and the
gradients of all rows add up in them. The decoder returns the states of the full forward, up to rounding.

It is one more call of the decoder, of few tokens: a gain where time goes with the tokens, as on a CPU, and a loss where
a call costs its launch. With dropout, the rows of a mini-batch would share its draw over their beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import ModelOutput

from gen2embed_mteb.embedder.passes.shared_beginning import longest_shared
from trainers.loss.dropout import has_dropout

_SHORTEST = 8
"""Tokens; below that a call of its own is not worth while."""

_KNOWN = {"attention_mask", "inputs_embeds", "past_key_values", "position_ids", "use_cache"}
_PER_TOKEN = {"visual_pos_masks"}
_PER_IMAGE = {"deepstack_visual_embeds"}


def can_share_prefix(model: nn.Module) -> bool:
    """Return whether the rows of a mini-batch may share what they begin with.

    Args:
        model: The inner model of a multimodal family, as `AutoModel` loads it.

    Returns:
        True if it has a decoder of its own, every layer of which keeps all keys. Checkpointed activations are computed
        again without a key/value cache, so a model that trains with gradient checkpointing does not share.
    """
    decoder = model.get_decoder()
    if decoder is model or not attends_to_all(model.config):
        return False
    checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())
    return not (decoder.training and checkpoints)


def gains_from_sharing(model: nn.Module) -> bool:
    """Return whether sharing saves time and changes nothing but rounding.

    Args:
        model: The inner model of a multimodal family, as `AutoModel` loads it.

    Returns:
        True if it is on a CPU and its decoder drops nothing.
    """
    decoder = model.get_decoder()
    drops = decoder.training and has_dropout(decoder.modules(), model.config.get_text_config())
    return next(model.parameters()).device.type == "cpu" and not drops


def attends_to_all(config: Any) -> bool:
    """Return whether every decoder layer of this configuration attends to all tokens.

    A layer with a sliding window drops keys, and a recurrent one keeps a state in place of keys, so that neither can be
    cut back to a shorter prefix.
    """
    config = config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is not None:
        return set(types) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


@contextmanager
def sharing_prefix(model: nn.Module) -> Iterator[None]:
    """Let the decoder run what its rows begin with once.

    Args:
        model: A model with `can_share_prefix`, whose inputs are not padded on the left.
    """
    decoder = model.get_decoder()
    run = decoder.forward
    limit = longest_shared(decoder.config)

    def forward(**kwargs: Any) -> ModelOutput:
        shared = num_shared(**kwargs)
        if shared < _SHORTEST or (limit is not None and kwargs["inputs_embeds"].shape[1] > limit):
            return run(**kwargs)
        states = kwargs.pop("inputs_embeds")
        positions, mask = kwargs.pop("position_ids", None), kwargs.pop("attention_mask", None)
        kwargs.update(past_key_values=DynamicCache(), use_cache=True)
        beginning = run(
            inputs_embeds=states[:1, :shared],
            position_ids=None if positions is None else positions[..., :1, :shared],
            attention_mask=None,
            **{name: value for name, value in kwargs.items() if name not in _PER_TOKEN | _PER_IMAGE},
        )
        kwargs["past_key_values"] = DynamicCache(
            tuple(part.expand(len(states), -1, -1, -1) for part in (layer.keys, layer.values))
            for layer in kwargs["past_key_values"].layers
        )
        for name in _PER_TOKEN & kwargs.keys():
            kwargs[name] = None if kwargs[name] is None else kwargs[name][:, shared:]
        rest = run(
            inputs_embeds=states[:, shared:],
            position_ids=None if positions is None else positions[..., shared:],
            attention_mask=mask,
            **kwargs,
        )
        parts = beginning.last_hidden_state.expand(len(states), -1, -1), rest.last_hidden_state
        return type(rest)(last_hidden_state=torch.cat(parts, dim=1))

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward  # the class's own shows again


def num_shared(
    *,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    visual_pos_masks: Tensor | None = None,
    **others: Any,
) -> int:
    """With how many equal tokens the rows of a decoder's inputs begin.

    Args:
        inputs_embeds: (n, length, d) token embeddings.
        position_ids: (n, length), or (axes, n, length) for M-RoPE, or None.
        attention_mask: (n, length) of ones and zeros, or None; any other form forbids sharing.
        past_key_values: None, or there is nothing to share.
        visual_pos_masks: (n, length), where tokens of images stand; a beginning ends before them.
        others: What else the decoder is given; anything unknown forbids sharing.

    Returns:
        A number of tokens below the length of the shortest row, 0 if there are fewer than two rows.
    """
    allowed = _KNOWN | _PER_TOKEN | _PER_IMAGE
    unknown = any(value is not None for name, value in others.items() if name not in allowed)
    if inputs_embeds is None or len(inputs_embeds) < 2 or past_key_values is not None or unknown:
        return 0
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
        return 0  # the model made the mask of each layer itself, since images attend otherwise than texts
    equal = (inputs_embeds == inputs_embeds[:1]).all(dim=2).all(dim=0)
    if position_ids is not None:
        equal &= (position_ids == position_ids[..., :1, :]).flatten(0, -2).all(dim=0)
    if attention_mask is not None:
        equal &= attention_mask.bool().all(dim=0)
    if visual_pos_masks is not None:
        equal &= ~visual_pos_masks.any(dim=0)
    equal[-1] = False  # every row runs a token of its own
    return int(equal.int().cumprod(dim=0).sum())
