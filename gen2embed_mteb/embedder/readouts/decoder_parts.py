"""The parts of a decoder that a readout leaves out: its layers, the last layer's MLP, and the final norm.

Decoders in transformers name these parts in different ways, and some compute more beside them. So the decoder runs two
tokens, and what runs, in which order, says which part is which. A decoder that does not have a part, or that does more
with it, is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Refusal = Callable[[str], Exception]
"""Makes an error of a reason."""

_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff")
"""Names that decoder layers in transformers give to their MLP."""
_OUTPUTS = re.compile(r"(^|\.)(down_proj|w2|fc2|fc_out|c_proj|wo|output_linear|ff_out)(_bias|\.weight|\.bias)?$")
"""Weights of an MLP, of its experts and of its shared expert, that are zero where the MLP returns zero."""
_PER_LAYER = ("no_rope_layers", "intermediate_size", "activation_sparsity_pattern")
"""Settings that may be lists with a number per layer; lists with a text or a switch per layer are found by length."""

_Outputs = list[tuple[str, Any]]


class NoMlp(nn.Module):
    """A module in an MLP's place that returns zeros, so that the residual stream passes as it is.

    Args:
        num_outputs: How many values the MLP returns (those with experts also return the router's); 0: a tensor alone.
    """

    def __init__(self, num_outputs: int = 0) -> None:
        """Keep the number."""
        super().__init__()
        self.num_outputs = num_outputs

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return zeros of the shape of the states."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *[None] * (self.num_outputs - 1)) if self.num_outputs else zeros


class DecoderParts:
    """The parts of one decoder.

    Args:
        model: The whole model of transformers.
        refusal: Makes the error that says why a part cannot be used.

    Attributes:
        decoder: The decoder.
        layers: Its layers.
        layers_name: Their attribute.

    Raises:
        Exception: That of `refusal`: the decoder has no list of layers, or does not run on tokens alone.
    """

    def __init__(self, model: Any, refusal: Refusal) -> None:
        """Find the layers, and run the decoder."""
        self._refusal = refusal
        self.decoder: Any = model.get_decoder()
        number = self.decoder.config.num_hidden_layers
        lists = {name: part for name, part in self.decoder.named_children() if isinstance(part, nn.ModuleList)}
        lists = {name: part for name, part in lists.items() if len(part) == number}
        if len(lists) != 1:
            raise refusal(f"its decoder {type(self.decoder).__name__} has no single list of {number} layers")
        self.layers_name, self.layers = next(iter(lists.items()))
        self._in_layer, self._in_decoder, self._state = self._run()

    @property
    def mlp_name(self) -> str:
        """The attribute of the last layer's MLP.

        Raises:
            Exception: That of `refusal`: the layer has no single MLP.
        """
        names = [name for name, _ in self._in_layer]
        found = [name for name in _MLPS if name in names]
        if len(found) != 1:
            layer = type(self.layers[-1]).__name__
            raise self._refusal(f"its last layer {layer} has no single MLP, but {', '.join(dict.fromkeys(names))}")
        return found[0]

    @property
    def before_mlp_name(self) -> str:
        """The attribute of the part of the last layer that runs just before its MLP: a norm, as a rule.

        Raises:
            Exception: That of `refusal`: the layer has no single MLP, or nothing runs before it.
        """
        names = [name for name, _ in self._in_layer]
        place = names.index(self.mlp_name)
        if place == 0:
            raise self._refusal(f"in its last layer {type(self.layers[-1]).__name__} nothing runs before the MLP")
        return names[place - 1]

    @property
    def norm_name(self) -> str:
        """The attribute of the final norm.

        Raises:
            Exception: That of `refusal`: the decoder's last part is no norm.
        """
        name, output = self._in_decoder[-1]
        if not ("norm" in name or "ln" in name) or not torch.equal(output, self._state):
            raise self._refusal(f"its decoder {type(self.decoder).__name__} ends with {name}, which is no norm")
        return name

    def leave_mlp_out(self) -> None:
        """Put a module that returns zeros in place of the last layer's MLP.

        Raises:
            Exception: That of `refusal`: behind the MLP, something else changes the state; the MLP is in its place
                again.
        """
        layer, name = self.layers[-1], self.mlp_name
        mlp, output = getattr(layer, name), dict(self._in_layer)[name]
        setattr(layer, name, NoMlp(len(output) if isinstance(output, tuple) else 0))
        try:
            seen, _, _ = self._run()
            behind = seen[[part for part, _ in seen].index(name) + 1 :]
            # A norm or dropout of the MLP's output may follow: of zeros they return zeros.
            others = [part for part, output in behind if not isinstance(output, torch.Tensor) or bool(output.any())]
            if others:
                raise self._refusal(
                    f"its last layer {type(layer).__name__} also runs {', '.join(others)} behind its MLP"
                )
        except Exception:
            setattr(layer, name, mlp)
            raise

    def leave_norm_weights_out(self) -> None:
        """Put a norm in place of the final one that only scales.

        Raises:
            Exception: That of `refusal`: the final norm does more than scale, as a LayerNorm does.
        """
        norm = getattr(self.decoder, self.norm_name)
        weight = getattr(norm, "weight", None)
        if isinstance(weight, torch.Tensor) and getattr(norm, "bias", None) is None:
            states = torch.linspace(-1, 2, len(weight), device=weight.device)[None, None]
            plain = copy.deepcopy(norm)
            for value in (1.0, 0.0):  # Gemma multiplies by 1 + weight
                with torch.no_grad():
                    plain.weight.fill_(value)
                    scaled = copy.deepcopy(plain).float()(states)
                if bool(scaled.any()) and float(torch.cosine_similarity(scaled, states, dim=-1)) > 1 - 1e-6:
                    setattr(self.decoder, self.norm_name, plain)
                    return
        raise self._refusal(
            f"its final norm {type(norm).__name__} does more than scale, which no stock module leaves out"
        )

    def settings_with(self, number: int) -> dict[str, Any]:
        """Return the settings of the decoder's configuration that change where only the first layers are left.

        Args:
            number: How many layers are left.
        """
        config, before = self.decoder.config, len(self.layers)
        changed: dict[str, Any] = {"num_hidden_layers": number}
        for name, value in vars(config).items():
            if isinstance(value, (list, tuple)) and len(value) == before:
                per_layer = "layer" in name and all(isinstance(one, (str, bool)) for one in value)
                if per_layer or name in _PER_LAYER:
                    changed[name] = value[:number]
        shared = getattr(config, "num_kv_shared_layers", None)
        if shared:  # the last layers use keys and values of those before them
            changed["num_kv_shared_layers"] = max(0, shared - (before - number))
        return changed

    def run_tokens(self) -> None:
        """Run the decoder on two tokens, for hooks."""
        self._run()

    def _run(self) -> tuple[_Outputs, _Outputs, torch.Tensor]:
        """Run two tokens; return names and outputs of the last layer's parts and the decoder's, and the last states."""
        in_layer: _Outputs = []
        in_decoder: _Outputs = []
        handles = [
            part.register_forward_hook(lambda _, __, output, name=name, seen=seen: seen.append((name, output)))
            for owner, seen in ((self.layers[-1], in_layer), (self.decoder, in_decoder))
            for name, part in owner.named_children()
        ]
        training = self.decoder.training
        try:
            with torch.no_grad():
                self.decoder.eval()
                ids = torch.zeros((1, 2), dtype=torch.long, device=next(self.decoder.parameters()).device)
                states = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self._refusal(f"its decoder does not run on tokens alone ({error})") from error
        finally:
            self.decoder.train(training)
            for handle in handles:
                handle.remove()
        return in_layer, in_decoder, states


def output_weights(mlp: nn.Module) -> list[nn.Parameter]:
    """Return the weights of an MLP that are zero where it returns zero; none, if their names are not known.

    Args:
        mlp: The MLP.
    """
    return [weight for name, weight in mlp.named_parameters() if _OUTPUTS.search(name)]


def with_zero_output(mlp: nn.Module, width: int) -> nn.Module | None:
    """Return a copy of an MLP that returns zeros because its output weights are zero.

    Args:
        mlp: The MLP.
        width: Of the states that it takes.

    Returns:
        The copy; `None` if its output is not zero.
    """
    zeroed = copy.deepcopy(mlp)
    weights = output_weights(zeroed)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        first = next(zeroed.parameters())
        output = zeroed(torch.ones((1, 2, width), dtype=first.dtype, device=first.device))
    output = output[0] if isinstance(output, tuple) else output
    return None if not weights or bool(output.any()) else zeroed


def differing_weight(model: Any) -> str:
    """Return the name of a weight that a model has otherwise than a new one of its configuration; "" if there is none.

    Args:
        model: A model of transformers, perhaps with an adapter. No memory is allocated for the new one.
    """
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            described = AutoModel.from_config(copy.deepcopy(model.config))
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        return str(error)
    due = {name: value.shape for name, value in described.state_dict().items()}
    there = {
        name.replace(".base_layer.", "."): value.shape
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    return next((name for name in sorted({**there, **due}) if there.get(name) != due.get(name)), "")
