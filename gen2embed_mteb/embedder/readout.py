"""Readouts: which hidden state of the decoder becomes the embedding.

The last layer of a generative model turns a state into the next token's column of the output layer. FreeRet
(arXiv 2509.24621) found that most of this happens in the last layer's MLP, and reads the state before it. A readout is:

- `last`: the state after the last layer, as in the paper;
- `pre-mlp`: the state after the last layer's attention, before its MLP;
- `drop-K`: the state after the last layer but K (`drop-1`, `drop-2`, …); the last K layers do not run at all;

each with the decoder's final norm, or without it. Without it the norm's weights are set to one value, so that it only
scales, which the L2 normalisation at the end undoes.

In memory the parts that do not take part are replaced, and kept aside, so that the same weights can still generate
(`generator_parts`). A written folder says the same with stock parts: the output weights of the last MLP are zero, the
layers are missing. The folder's `config.json` names the readout under `gen2embed`.

Cost: one forward pass of two tokens when a model is loaded; while a `pre-mlp` model is written, a copy of one MLP.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gen2embed_mteb.errors import Gen2EmbedError

LAST, PRE_MLP = "last", "pre-mlp"
CONFIG_KEY = "gen2embed"
"""The key of `config.json` under which a written folder names its readout."""

_DROP = re.compile(r"drop-([1-9]\d{0,3})")
_MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff")
"""Names that decoder layers in transformers give to their MLP."""
_OUTPUTS = re.compile(r"(^|\.)(down_proj|w2|fc2|fc_out|c_proj|wo|output_linear|ff_out)(_bias|\.weight|\.bias)?$")
"""Weights of an MLP, of its experts and of its shared expert, that are zero where the MLP returns zero."""
_PER_LAYER = ("no_rope_layers", "intermediate_size", "activation_sparsity_pattern")
"""Settings that may be lists with a number per layer; lists with a text or a switch per layer are found by length."""
_KEPT = "_gen2embed_readout"


@dataclass(frozen=True)
class Readout:
    """Which hidden state becomes the embedding.

    Attributes:
        state: `last`, `pre-mlp`, or `drop-K` with K of 1 or more.
        norm: Whether the decoder's final norm is applied to it.

    Raises:
        Gen2EmbedError: The state is none of these.
    """

    state: str = LAST
    norm: bool = True

    def __post_init__(self) -> None:
        """Check both values, and write the state in its common form."""
        known = f"known: {LAST}, {PRE_MLP}, drop-1, drop-2, …"
        if not isinstance(self.state, str):
            raise Gen2EmbedError(f"readout is {self.state!r}; {known}")
        state = self.state.lower().replace("_", "-")
        if state not in (LAST, PRE_MLP) and not _DROP.fullmatch(state):
            raise Gen2EmbedError(f"unknown readout {self.state!r}; {known}")
        if not isinstance(self.norm, bool):
            raise Gen2EmbedError(f"readout_norm is {self.norm!r}; pass True or False")
        object.__setattr__(self, "state", state)

    @property
    def num_dropped(self) -> int:
        """How many of the last layers do not run."""
        match = _DROP.fullmatch(self.state)
        return int(match[1]) if match else 0

    @property
    def is_default(self) -> bool:
        """Whether it is the paper's: the last state, with the final norm."""
        return self == Readout()

    @property
    def name(self) -> str:
        """A name for folders and messages: the state, and `-raw` without the final norm."""
        return self.state if self.norm else f"{self.state}-raw"

    def settings(self) -> dict[str, Any]:
        """Return it as `config.json` has it."""
        return {"readout": self.state, "readout_norm": self.norm}


@dataclass
class _Kept:
    """What was replaced in a model.

    Attributes:
        readout: The readout that the model has now.
        left_out: Names of the parts that do not run, as the model's submodules.
        parts: The generator's own parts, by the name of the parent module and the attribute.
        settings: The generator's own values of the decoder's configuration.
    """

    readout: Readout
    left_out: tuple[str, ...] = ()
    parts: dict[tuple[str, str], nn.Module] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


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


def stored_readout(config: Any, source: str) -> Readout:
    """Return the readout that a model's configuration names; the default one if it names none.

    Args:
        config: The configuration of the whole model.
        source: The model's name, for messages.

    Raises:
        Gen2EmbedError: `config.json` names none that is known.
    """
    stated = getattr(config, CONFIG_KEY, None)
    if stated is None:
        return Readout()
    try:
        return Readout(stated.get("readout", LAST), stated.get("readout_norm", True))
    except (AttributeError, Gen2EmbedError) as error:
        raise Gen2EmbedError(
            f"{source}/config.json: {CONFIG_KEY} is {str(stated)[:80]}, which names no readout ({error}); write the "
            "folder again: gen2embed export BASE_MODEL OUT --readout …"
        ) from error


def chosen_readout(state: str | None, norm: bool | None, stored: Readout, source: str) -> Readout:
    """Return the readout that a caller asks for, of a model that may have one already.

    Args:
        state: As in `Readout`; `None` keeps the stored one.
        norm: As in `Readout`; `None` keeps the stored one.
        stored: What the model's folder has.
        source: The model's name, for messages.

    Raises:
        Gen2EmbedError: The values are unknown, or the weights that it needs were left out when the folder was written.
    """
    wanted = Readout(stored.state if state is None else state, stored.norm if norm is None else norm)
    lost = stored.state not in (LAST, wanted.state) or (wanted.norm and not stored.norm)
    if lost:
        raise Gen2EmbedError(
            f"{source} was exported with readout={stored.state!r}, readout_norm={stored.norm}, and the weights that "
            f"readout={wanted.state!r}, readout_norm={wanted.norm} needs are not in it; use the model that it was "
            "exported from, or leave readout out"
        )
    return wanted


def readout_of(model: nn.Module) -> Readout:
    """Return the readout that was set on a model of transformers."""
    return _kept(model).readout


def left_out(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that do not run: the last MLP, or the last layers."""
    return _kept(model).left_out


def set_readout(model: nn.Module, wanted: Readout, source: str) -> None:
    """Set the readout of a model that was just loaded, in place.

    Args:
        model: The model of transformers, as `AutoModel` loads it, perhaps with an adapter.
        wanted: The readout.
        source: The model's name, for messages.

    Raises:
        Gen2EmbedError: The decoder has no such state that stock parts can give, or an adapter has weights for what is
            left out.
    """
    stored = stored_readout(model.config, source)
    vars(model)[_KEPT] = kept = _Kept(wanted)
    if wanted.is_default:
        return
    decoder = model.get_decoder()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is decoder)
    path = f"{name}." if name else ""
    where = f"{source} (model type {model.config.model_type!r})"  # type: ignore[union-attr]
    run = _Run(model, decoder, wanted, where)
    if wanted.num_dropped and not stored.num_dropped:
        count = wanted.num_dropped
        if count >= len(run.layers):
            raise Gen2EmbedError(
                f"readout={wanted.state!r} leaves no layer of {where}, which has {len(run.layers)}; drop fewer"
            )
        first = len(run.layers) - count
        kept.left_out = tuple(f"{path}{run.layers_name}.{number}" for number in range(first, len(run.layers)))
        _refuse_adapter(model, kept, where)
        kept.parts[name, run.layers_name] = run.layers
        _drop_layers(model, decoder, run, count, kept, where)
    elif wanted.state == PRE_MLP:
        attribute = run.mlp()
        layer = f"{path}{run.layers_name}.{len(run.layers) - 1}"
        kept.left_out = (f"{layer}.{attribute}",)
        _refuse_adapter(model, kept, where)
        weights = _output_weights(getattr(run.layers[-1], attribute), where)
        if stored.state == PRE_MLP and any(bool(weight.any()) for weight in weights):
            raise Gen2EmbedError(
                f"{source}/config.json names the readout {PRE_MLP!r}, but the output weights of {layer}.{attribute} "
                "are not zero: the files are not of one model; write the folder again with gen2embed export"
            )
        kept.parts[layer, attribute] = run.leave_mlp_out(model, attribute)
    if not wanted.norm:
        attribute, norm = run.norm()
        _refuse_adapter(model, _Kept(wanted, (f"{path}{attribute}",)), where)
        kept.parts[name, attribute] = norm
        setattr(decoder, attribute, _without_weights(norm, where))
    setattr(model.config, CONFIG_KEY, wanted.settings())


@contextlib.contextmanager
def generator_parts(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model run as the generator that it was loaded as: with all layers, its last MLP and its final norm.

    Args:
        model: The model of transformers. A folder that was exported with a readout has no such parts.

    Yields:
        The model; afterwards it has its readout again.
    """
    kept = _kept(model)
    config = model.get_decoder().config  # type: ignore[operator]
    device = next(model.parameters()).device
    parts = {key: part.to(device) for key, part in kept.parts.items()}
    now = {name: getattr(config, name) for name in kept.settings}
    with _in_place(model, parts):
        _set(config, kept.settings)
        try:
            yield model
        finally:
            _set(config, now)


@contextlib.contextmanager
def stock_parts(model: nn.Module) -> Iterator[None]:
    """Let a model consist of stock parts while it is written: in place of the last MLP a copy whose output is zero.

    Args:
        model: The model of transformers.

    Raises:
        Gen2EmbedError: The copy's output is not zero.
    """
    kept = _kept(model)
    parts = {}
    if kept.readout.state == PRE_MLP:
        ((key, mlp),) = ((key, part) for key, part in kept.parts.items() if ".".join(key) in kept.left_out)
        parts[key] = zeroed = copy.deepcopy(mlp)
        with torch.no_grad():
            for weight in _output_weights(zeroed, type(model).__name__):
                weight.zero_()
            _check_zero(zeroed, model)
    with _in_place(model, parts):
        yield


class _Run:
    """What one forward pass of two tokens shows of a decoder: which of its parts run, in which order.

    Args:
        model: The whole model.
        decoder: Its decoder.
        readout: What it is needed for, for messages.
        where: The model's name and type, for messages.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, readout: Readout, where: str) -> None:
        """Find the layers, and run the decoder."""
        self.readout, self.where, self.decoder = readout, where, decoder
        number = decoder.config.num_hidden_layers  # type: ignore[union-attr]
        lists = [name for name, part in decoder.named_children() if isinstance(part, nn.ModuleList)]
        lists = [name for name in lists if len(getattr(decoder, name)) == number]
        if len(lists) != 1:
            raise self._refusal(f"its decoder {type(decoder).__name__} has no single list of {number} layers")
        self.layers_name = lists[0]
        self.layers: nn.ModuleList = getattr(decoder, lists[0])
        self.in_layer, self.in_decoder, self.state = self._run(model)

    def _run(self, model: nn.Module) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]], torch.Tensor]:
        """Run two tokens; return names and outputs of the last layer's parts and the decoder's, and the last state."""
        in_layer: list[tuple[str, Any]] = []
        in_decoder: list[tuple[str, Any]] = []
        handles = [
            part.register_forward_hook(lambda _, __, output, name=name, seen=seen: seen.append((name, output)))
            for owner, seen in ((self.layers[-1], in_layer), (self.decoder, in_decoder))
            for name, part in owner.named_children()
        ]
        training = model.training
        try:
            with torch.no_grad():
                model.eval()
                ids = torch.zeros((1, 2), dtype=torch.long, device=next(self.decoder.parameters()).device)
                state = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self._refusal(f"its decoder does not run on tokens alone ({error})") from error
        finally:
            model.train(training)
            for handle in handles:
                handle.remove()
        return in_layer, in_decoder, state

    def leave_mlp_out(self, model: nn.Module, attribute: str) -> nn.Module:
        """Replace the last layer's MLP by zeros; return the MLP.

        Raises:
            Gen2EmbedError: Behind the MLP, something else changes the state.
        """
        layer = self.layers[-1]
        mlp = getattr(layer, attribute)
        output = dict(self.in_layer)[attribute]
        setattr(layer, attribute, NoMlp(len(output) if isinstance(output, tuple) else 0))
        try:
            seen, _, _ = self._run(model)
            behind = seen[[name for name, _ in seen].index(attribute) + 1 :]
            # A norm or dropout of the MLP's output may follow: of zeros they return zeros.
            others = [name for name, output in behind if not isinstance(output, torch.Tensor) or output.any()]
            if others:
                raise self._refusal(f"its last layer {type(layer).__name__} also runs {', '.join(others)} behind its MLP")
        except Exception:
            setattr(layer, attribute, mlp)
            raise
        return mlp

    def mlp(self) -> str:
        """Return the name of the last layer's MLP.

        Raises:
            Gen2EmbedError: The layer has no single MLP.
        """
        names = [name for name, _ in self.in_layer]
        found = [name for name in _MLPS if name in names]
        if len(found) != 1:
            layer = type(self.layers[-1]).__name__
            raise self._refusal(f"its last layer {layer} has no single MLP, but {', '.join(dict.fromkeys(names))}")
        return found[0]

    def norm(self) -> tuple[str, nn.Module]:
        """Return the name of the decoder's final norm, and the norm.

        Raises:
            Gen2EmbedError: The decoder's last part is no norm.
        """
        name, output = self.in_decoder[-1]
        if "norm" not in name and "ln" not in name or not torch.equal(output, self.state):
            raise self._refusal(f"its decoder {type(self.decoder).__name__} ends with {name}, which is no norm")
        return name, getattr(self.decoder, name)

    def _refusal(self, reason: str) -> Gen2EmbedError:
        return _refusal(self.readout, self.where, reason)


def _refusal(readout: Readout, where: str, reason: str) -> Gen2EmbedError:
    return Gen2EmbedError(
        f"readout={readout.state!r} with readout_norm={readout.norm} is not possible for {where}: {reason}. Use another "
        f"readout, such as {LAST!r} with readout_norm=True"
    )


def _drop_layers(model: nn.Module, decoder: nn.Module, run: _Run, count: int, kept: _Kept, where: str) -> None:
    """Delete the last layers, with their settings; compare the rest with a new model of the changed settings."""
    from transformers import AutoModel

    config = decoder.config
    number = len(run.layers)
    changed: dict[str, Any] = {"num_hidden_layers": number - count}
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == number:
            per_layer = name in _PER_LAYER or ("layer" in name and all(isinstance(v, (str, bool)) for v in value))
            changed |= {name: value[: number - count]} if per_layer else {}
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:  # the last layers use keys and values of those before them
        changed["num_kv_shared_layers"] = max(0, shared - count)
    kept.settings = {name: getattr(config, name) for name in changed}
    _set(config, changed)
    setattr(decoder, run.layers_name, nn.ModuleList(list(run.layers)[: number - count]))
    try:
        with torch.device("meta"):
            described = AutoModel.from_config(copy.deepcopy(model.config))
        there = {_plain(key): value.shape for key, value in model.state_dict().items() if not _of_adapter(key)}
        due = {_plain(key): value.shape for key, value in described.state_dict().items()}
        reason = next((key for key in sorted({**there, **due}) if there.get(key) != due.get(key)), "")
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = str(error)
    if reason:
        raise _refusal(
            kept.readout, where, f"a model with {number - count} layers has other weights besides them ({reason})"
        )


def _plain(key: str) -> str:
    return key.replace(".base_layer.", ".")


def _of_adapter(key: str) -> bool:
    return ".lora_" in key


def _output_weights(mlp: nn.Module, where: str) -> list[torch.Tensor]:
    """Return the weights of an MLP that are zero where it returns zero.

    Raises:
        Gen2EmbedError: None is found by its name.
    """
    found = [weight for name, weight in mlp.named_parameters() if _OUTPUTS.search(name)]
    if not found:
        names = sorted({name.removesuffix(".weight") for name, _ in mlp.named_parameters()})
        raise Gen2EmbedError(
            f"readout={PRE_MLP!r} is not possible for {where}: which of {', '.join(names)[:200]} gives the output of "
            f"its last MLP {type(mlp).__name__} is not known. Use readout='drop-1'"
        )
    return found


def _check_zero(mlp: nn.Module, model: nn.Module) -> None:
    width = model.get_decoder().config.hidden_size  # type: ignore[operator]
    weight = next(mlp.parameters())
    output = mlp(torch.ones((1, 2, width), dtype=weight.dtype, device=weight.device))
    output = output[0] if isinstance(output, tuple) else output
    if output.any():
        raise Gen2EmbedError(
            f"readout={PRE_MLP!r} of a {type(model).__name__} cannot be saved: the output of its last MLP is not zero "
            "where its output weights are. Use readout='drop-1'"
        )


def _without_weights(norm: nn.Module, where: str) -> nn.Module:
    """Return a copy of a norm that only scales.

    Raises:
        Gen2EmbedError: It does more than scale, as a LayerNorm does.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, torch.Tensor) and not _has_bias(norm):
        states = torch.linspace(-1, 2, len(weight), dtype=torch.float32, device=weight.device)[None, None]
        plain = copy.deepcopy(norm)
        for value in (1.0, 0.0):  # Gemma multiplies by 1 + weight
            with torch.no_grad():
                plain.weight.fill_(value)  # type: ignore[operator, union-attr]
                exact = copy.deepcopy(plain).float()(states)
            ratio = exact / states
            if bool(exact.any()) and float(ratio.max() - ratio.min()) < 1e-4 * float(ratio.abs().max()):
                return plain
    raise Gen2EmbedError(
        f"readout_norm=False is not possible for {where}: its final norm {type(norm).__name__} does more than scale, and "
        "no stock module leaves that out. Leave readout_norm out"
    )


def _has_bias(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def _refuse_adapter(model: nn.Module, kept: _Kept, where: str) -> None:
    """Refuse an adapter that has weights in a part that is left out: it was trained with another readout."""
    if not hasattr(model, "peft_config"):
        return
    for name, _ in model.named_parameters():
        if (".lora_" in name or ".modules_to_save." in name) and any(
            name.startswith(f"{part}.") for part in kept.left_out
        ):
            raise adapter_refusal(kept.readout, name, where)


def adapter_refusal(readout: Readout, name: str, where: str) -> Gen2EmbedError:
    """Return the error for an adapter that has weights in a part that the readout leaves out.

    Args:
        readout: The readout.
        name: The name of such a weight.
        where: The model or adapter, for the message.
    """
    return Gen2EmbedError(
        f"{where}: the adapter has the weight {name}, in a part that readout={readout.state!r} with readout_norm="
        f"{readout.norm} leaves out, so it was trained with another readout; use that one, or train an adapter with "
        "this one"
    )


def _kept(model: nn.Module) -> _Kept:
    found: _Kept = vars(model).get(_KEPT, _Kept(Readout()))
    return found


def _set(config: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


@contextlib.contextmanager
def _in_place(model: nn.Module, parts: dict[tuple[str, str], nn.Module]) -> Iterator[None]:
    """Put parts in their places for a while."""
    now = {}
    try:
        for (parent, attribute), part in parts.items():
            owner = model.get_submodule(parent)
            now[parent, attribute] = getattr(owner, attribute)
            setattr(owner, attribute, part)
        yield
    finally:
        for (parent, attribute), part in now.items():
            setattr(model.get_submodule(parent), attribute, part)
