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
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gen2embed_mteb.embedder.passes.one_at_a_time import Lock, LockedCall
from gen2embed_mteb.embedder.readouts.choice import CONFIG_KEY, LAST, PRE_MLP, Readout, stored_readout
from gen2embed_mteb.embedder.readouts.decoder_parts import (
    DecoderParts,
    Refusal,
    differing_weight,
    output_weights,
    with_zero_output,
)
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import json_bytes, write_atomic

READOUT_FILE = "readout.json"
"""The file beside an adapter that names the readout that it was trained for."""

_KEPT = "_gen2embed_readout"


@dataclass
class _Kept:
    """What was replaced in a model.

    Attributes:
        readout: The readout that the model has now.
        left_out: Names of the parts that do not run, as the model's submodules.
        parts: The generator's own parts, by the name of the parent module and the attribute.
        settings: The generator's own values of the decoder's configuration.
        lock: Held by the thread that runs the model, or has other parts in their places.
    """

    readout: Readout
    left_out: tuple[str, ...] = ()
    parts: dict[tuple[str, str], nn.Module] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


def write_readout(model: nn.Module, folder: Path) -> None:
    """Write the readout of a model beside its adapter, which was trained for it; nothing for the default one.

    Args:
        model: The model of transformers.
        folder: The adapter's folder, which is new.
    """
    readout = readout_of(model)
    if not readout.is_default:
        write_atomic(folder / READOUT_FILE, json_bytes(readout.settings()))


def note_readout_of_adapter(model: nn.Module, folder: Path) -> None:
    """Note on a model which readout its adapter was trained for; `set_readout` is to set it.

    Args:
        model: The model of transformers; its parts stay as they are.
        folder: The adapter's folder.

    Raises:
        Gen2EmbedError: Its `readout.json` names none that is known.
    """
    path = folder / READOUT_FILE
    if _KEPT in vars(model) or not path.is_file():
        return
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        vars(model)[_KEPT] = _Kept(Readout(stated.get("readout", LAST), stated.get("readout_norm", True)))
    except (ValueError, AttributeError, RecursionError) as error:  # a `Gen2EmbedError` is a ValueError
        raise Gen2EmbedError(f"{path} names no readout ({error}); delete it, and pass readout=") from error


def readout_of(model: nn.Module) -> Readout:
    """Return the readout that was set on a model of transformers."""
    return _kept(model).readout


def left_out(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that do not run: the last MLP, or the last layers."""
    return _kept(model).left_out


def set_readout(model: Any, wanted: Readout, source: str) -> None:
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
    kept = _Kept(wanted)
    if not wanted.is_default:
        where = f"{source} (model type {model.config.model_type!r})"

        def refusal(reason: str) -> Gen2EmbedError:
            return Gen2EmbedError(
                f"readout={wanted.state!r} with readout_norm={wanted.norm} is not possible for {where}: {reason}. Use "
                "another readout; 'last' with readout_norm=True is always possible"
            )

        parts = DecoderParts(model, refusal)
        path = next(name for name, module in model.named_modules() if module is parts.decoder)
        change = _Change(model, parts, path, kept, where, refusal)
        if wanted.num_dropped and not stored.num_dropped:
            _drop_layers(change)
        elif wanted.state == PRE_MLP:
            _leave_mlp_out(change, stored)
        if not wanted.norm:
            name = parts.norm_name
            _refuse_adapter(model, wanted, [_joined(path, name)], where)
            kept.parts[path, name] = getattr(parts.decoder, name)
            parts.leave_norm_weights_out()
        setattr(model.config, CONFIG_KEY, wanted.settings())
        vars(model)["forward"] = LockedCall(model, "forward", kept.lock)
    vars(model)[_KEPT] = kept


@contextlib.contextmanager
def generator_parts(model: Any) -> Iterator[Any]:
    """Let a model run as the generator that it was loaded as: with all layers, its last MLP and its final norm.

    Other threads that run the model wait meanwhile.

    Args:
        model: The model of transformers. A folder that was exported with a readout has no such parts.

    Yields:
        The model; afterwards it has its readout again.
    """
    kept = _kept(model)
    config = model.get_decoder().config
    weight = next(model.get_decoder().parameters())
    parts = {key: part.to(weight.device, weight.dtype) for key, part in kept.parts.items()}
    with kept.lock, _in_place(model, parts):
        now = {name: getattr(config, name) for name in kept.settings}
        _set(config, kept.settings)
        try:
            yield model
        finally:
            _set(config, now)


def run_as_generator(generator: Any, model: Any) -> None:
    """Let a generative model that is built around a model run with `generator_parts`, whenever it is called.

    Args:
        generator: The generative model.
        model: The model of transformers inside it, which may have a readout.
    """
    if readout_of(model).is_default:
        return
    if generator.config is not model.config:
        _set(generator.config.get_text_config(decoder=True), _kept(model).settings)
        delattr(generator.config, CONFIG_KEY)  # a folder of the generator has no readout
    for name in ("forward", "generate"):
        call = getattr(generator, name)

        @functools.wraps(call)
        def run(*args: Any, call: Any = call, **kwargs: Any) -> Any:
            with generator_parts(model):
                return call(*args, **kwargs)

        setattr(generator, name, run)


@contextlib.contextmanager
def stock_parts(model: Any) -> Iterator[None]:
    """Let a model consist of stock parts while it is written: in place of the last MLP a copy whose output is zero.

    Args:
        model: The model of transformers.

    Raises:
        Gen2EmbedError: The copy's output is not zero.
    """
    kept = _kept(model)
    parts = {}
    for key, mlp in kept.parts.items():
        if kept.readout.state == PRE_MLP and _joined(*key) in kept.left_out:
            weight = next(model.get_decoder().parameters())
            zeroed = with_zero_output(mlp.to(weight.device, weight.dtype), model.get_decoder().config.hidden_size)
            if zeroed is None:
                raise Gen2EmbedError(
                    f"readout={PRE_MLP!r} of a {type(model).__name__} cannot be saved: the output of its last MLP is "
                    "not zero where its output weights are. Use readout='drop-1'"
                )
            parts[key] = zeroed
    with kept.lock, _in_place(model, parts):
        yield


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Keep other threads from exchanging parts of a model, or values of its configuration.

    Args:
        model: A model of transformers.
    """
    with _kept(model).lock:
        yield


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


@dataclass(frozen=True)
class _Change:
    """What the changes of one model need: the model, its decoder's parts and path, what is kept, and messages."""

    model: Any
    parts: DecoderParts
    path: str
    kept: _Kept
    where: str
    refusal: Refusal


def _drop_layers(change: _Change) -> None:
    """Delete the last layers, with their settings; the rest must be what a new model of the changed settings is."""
    model, parts, path, kept, refusal = change.model, change.parts, change.path, change.kept, change.refusal
    layers, name = parts.layers, parts.layers_name
    number = len(layers) - kept.readout.num_dropped
    if number < 1:
        raise refusal(f"it has {len(layers)} layers, of which none would be left")
    kept.left_out = tuple(_joined(path, name, str(index)) for index in range(number, len(layers)))
    _refuse_adapter(model, kept.readout, kept.left_out, change.where)
    changed = parts.settings_with(number)
    config = parts.decoder.config
    kept.settings = {key: getattr(config, key) for key in changed}
    kept.parts[path, name] = layers
    _set(config, changed)
    setattr(parts.decoder, name, nn.ModuleList(list(layers)[:number]))
    if differing := differing_weight(model):
        _set(config, kept.settings)
        setattr(parts.decoder, name, layers)
        raise refusal(f"with {number} layers, other weights differ, too ({differing})")


def _leave_mlp_out(change: _Change, stored: Readout) -> None:
    """Put a module that returns zeros in place of the last layer's MLP."""
    model, parts, path, kept, refusal = change.model, change.parts, change.path, change.kept, change.refusal
    name, layer = parts.mlp_name, _joined(path, parts.layers_name, str(len(parts.layers) - 1))
    mlp = getattr(parts.layers[-1], name)
    kept.left_out = (f"{layer}.{name}",)
    _refuse_adapter(model, kept.readout, kept.left_out, change.where)
    weights = output_weights(mlp)
    if not weights:
        names = sorted({key.removesuffix(".weight") for key, _ in mlp.named_parameters()})
        raise refusal(f"which of {', '.join(names)[:200]} gives the output of its last MLP is not known")
    if stored.state == PRE_MLP and any(bool(weight.any()) for weight in weights):
        raise Gen2EmbedError(
            f"{change.where}: config.json names the readout {PRE_MLP!r}, but the output weights of {layer}.{name} are "
            "not zero: the files are not of one model; write the folder again with gen2embed export"
        )
    parts.leave_mlp_out()
    kept.parts[layer, name] = mlp


def _refuse_adapter(model: Any, readout: Readout, parts: Iterable[str], where: str) -> None:
    """Refuse an adapter that has weights in a part that is left out: it was trained with another readout."""
    if not hasattr(model, "peft_config"):
        return
    inside = tuple(f"{part}." for part in parts)
    for name, _ in model.named_parameters():
        if (".lora_" in name or ".modules_to_save." in name) and name.startswith(inside):
            raise adapter_refusal(readout, name, where)


def _kept(model: Any) -> _Kept:
    found: _Kept = vars(model).get(_KEPT, _Kept(Readout()))
    return found


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


@contextlib.contextmanager
def _in_place(model: Any, parts: Mapping[tuple[str, str], nn.Module]) -> Iterator[None]:
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
