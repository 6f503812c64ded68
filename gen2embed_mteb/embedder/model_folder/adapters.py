"""PEFT adapters (LoRA, DoRA) on a base model: creating, loading with a check of every key, saving, and merging.

transformers loses DoRA's magnitudes when it loads an adapter, and ignores keys that it does not know. Here peft itself
sets the weights, and a key that is missing or left over is an error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder.adapter_settings import full_matches
from gen2embed_mteb.embedder.readouts.readout import (
    adapter_refusal,
    left_out,
    note_readout_of_adapter,
    readout_of,
    write_readout,
)
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = model_folder.ADAPTER_FILE, model_folder.ADAPTER_WEIGHTS

# Prefixes of wrappers under which adapters were trained, removed in this order: peft's own, the generation head's, and
# those of older versions of transformers, which kept the language model at the root (Qwen2-VL) or in a wrapper (LLaVA).
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.model\.", ""),
    (r"^model\.", ""),
    (r"^(?=layers\.)", "language_model."),
    (r"^language_model\.model\.", "language_model."),
)


def has_adapter(model: torch.nn.Module) -> bool:
    """Return whether an adapter is attached to any layer of the model."""
    return _first_wrapper(model) is not None


def load_adapter(model: torch.nn.Module, adapter: str | Path, **hub_options: Any) -> None:
    """Attach an adapter to a base model, in place.

    Args:
        model: The base model, as `AutoModel` loads it.
        adapter: Directory or hub id with `adapter_config.json` and `adapter_model.safetensors`.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, for an adapter on the hub.

    Raises:
        FileNotFoundError: The directory holds no safetensors weights.
        ValueError: The model does not have a key of the adapter, or the adapter lacks a key that the model expects.
    """
    from peft import PeftConfig, inject_adapter_in_model

    # Read before the model is changed: an unreadable adapter leaves the model as it was.
    folder = find_adapter(adapter, **hub_options)
    state = _read_weights(folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    stated = {key: getattr(config, key) for key in ("target_modules", "exclude_modules")}
    _match_patterns(config, model, folder)
    inject_adapter_in_model(config, model)
    for key, value in stated.items():
        setattr(config, key, value)  # the adapter's own values, for saving it again
    set_adapter_weights(model, state, str(adapter))
    note_readout_of_adapter(model, folder)
    model.eval()


def reload_adapter(model: torch.nn.Module, adapter: str | Path, **hub_options: Any) -> None:
    """Set the weights of an adapter that is attached already; arguments and checks are those of `load_adapter`."""
    set_adapter_weights(model, _read_weights(find_adapter(adapter, **hub_options)), str(adapter))


def set_adapter_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Set the weights of the attached adapter.

    Raises:
        ValueError: A key is missing or unexpected, or a shape differs; the message names `source` and the keys.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model)
    best = {_renamed(key, expected): value for key, value in state.items()}
    missing, unexpected = sorted(set(expected) - set(best)), sorted(set(best) - set(expected))
    names = [f".{key}" for key in [*unexpected, *(key for key in state if _renamed(key, expected) in unexpected)]]
    behind = next((name for name in names for part in left_out(model) if f".{part}." in name), None)
    if behind is not None:
        raise adapter_refusal(readout_of(model), behind[1:], source)
    if missing or unexpected:
        raise Gen2EmbedError(
            f"adapter {source} does not fit {type(model).__name__}: {len(missing)} missing keys {missing[:3]}, "
            f"{len(unexpected)} unexpected keys {unexpected[:3]}. Load it on the base model it was trained on."
        )
    differing = [key for key in expected if expected[key].shape != best[key].shape]
    if differing:
        raise Gen2EmbedError(
            f"adapter {source} does not fit {type(model).__name__}: {differing[0]} has shape "
            f"{tuple(best[differing[0]].shape)}, the model expects {tuple(expected[differing[0]].shape)}."
        )
    set_peft_model_state_dict(model, best)


def new_adapter(
    model: torch.nn.Module,
    targets: Sequence[str],
    *,
    rank: int = 8,
    alpha: int = 64,
    dropout: float = 0.1,
    dora: bool = True,
    allow_missing: bool = False,
    everywhere: bool = False,
) -> None:
    """Attach a new adapter to a base model, in place, and freeze all other weights (paper, Sec. IV-A).

    Only layers of the decoder are adapted, unless `everywhere` is set. Vision towers have projections of the same
    names, but the paper's adapters, on Qwen2-VL, do not include them; and an adapter there would get no gradient from a
    batch of text.

    Its weights are float32 whatever the type of the base model's: steps of 5e-5 would be lost in bfloat16.

    Args:
        model: The base model, as `AutoModel` loads it.
        targets: Names of the decoder's linear layers (`families.Family.lora_targets`).
        rank: The rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: The dropout on the update's input.
        dora: Whether magnitudes are trained besides directions (DoRA).
        allow_missing: Whether a target may match no layer, as long as one does: `targets` are those of many families.
        everywhere: Whether layers outside of the decoder are adapted too, as the official code does by their names.

    Raises:
        ValueError: The model has an adapter already, or a target matches no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapter(model):
        raise Gen2EmbedError("the model has an adapter already; merge it first: gen2embed export MODEL OUT")
    pattern = r"(?:.*\.)?(?:{})" if everywhere else _in_decoder(model)
    layers = _linear_layers(model)
    found = [
        target for target in targets if any(re.fullmatch(pattern.format(re.escape(target)), name) for name in layers)
    ]
    missing = [target for target in targets if target not in found]
    if missing and (not found or not allow_missing):
        raise Gen2EmbedError(
            f"adapter target {missing[0]!r} matches no layer of {type(model).__name__}'s language model; "
            f"it has {', '.join(linear_names(model))}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        init_lora_weights="gaussian",
        target_modules=pattern.format("|".join(map(re.escape, found))),
        base_model_name_or_path=model.config.name_or_path,
    )
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the names of the decoder's linear layers, each once: all that `new_adapter` can take as targets.

    Args:
        model: The base model, as `AutoModel` loads it.
    """
    pattern = _in_decoder(model).format(r"[^.]+")
    return sorted({name.rpartition(".")[2] for name in _linear_layers(model) if re.fullmatch(pattern, name)})


def _linear_layers(model: torch.nn.Module) -> list[str]:
    from torch.nn import Linear

    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def _in_decoder(model: torch.nn.Module) -> str:
    """Return a pattern for the names of the decoder's layers, with `{}` for their last part.

    It leaves out what the readout leaves out, so that the adapter fits the same base model with all its layers, too.
    """
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    unused = "|".join(map(re.escape, left_out(model)))
    start = rf"(?!(?:.*\.)?(?:{unused})\.)" if unused else ""
    return start + (rf"(?:.*\.)?{re.escape(name)}\.(?:.*\.)?(?:{{}})" if name else r"(?:.*\.)?(?:{})")


def save_adapter(model: torch.nn.Module, output_dir: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the attached adapter as peft does, so that `load_adapter` and peft itself read it.

    Args:
        model: The model with its adapter.
        output_dir: Folder to write into; it is created if missing.
        state: The model's `state_dict`, if the model's own is distributed over several processes.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import save_file

    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    (name,) = layer.active_adapters
    output_dir.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, state_dict=state)
    saved = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(saved, output_dir / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.save_pretrained(str(output_dir))
    write_readout(model, output_dir)
    if state is None:
        check_adapter(model, output_dir)


def check_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Compare names and shapes of a written adapter with those of the attached one.

    Args:
        model: The model with its adapter.
        folder: Where the adapter was written.

    Raises:
        Gen2EmbedError: They differ.
    """
    from peft import get_peft_model_state_dict

    wanted = {f"base_model.model.{key}": tuple(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    written = shapes_in(folder / WEIGHTS_FILE)
    if wanted != written:
        differing = sorted(key for key in {**wanted, **written} if wanted.get(key) != written.get(key))
        raise Gen2EmbedError(
            f"{folder / WEIGHTS_FILE} does not hold the adapter of the model: {len(differing)} weights differ, the "
            f"first {differing[0]}"
        )


def merged_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of the model with its adapter merged into the base weights; the model itself is not changed.

    The copy computes the same as the model in its present state: a layer whose adapter is switched off keeps its base
    weights. The copy takes as much memory as the model.

    Raises:
        Gen2EmbedError: The adapter of a layer cannot be merged.
    """
    merged = copy.deepcopy(model)
    while (found := _first_wrapper(merged)) is not None:
        name, wrapper = found
        try:
            plain = _unwrapped(wrapper)
        except Exception as error:  # whatever a tuner's own code raises
            raise Gen2EmbedError(
                f"the adapter of layer {name} ({type(wrapper).__name__}) cannot be merged into the weights: {error}. "
                "Keep base model and adapter apart, and load them with adapter="
            ) from error
        parent, _, attribute = name.rpartition(".")
        setattr(merged.get_submodule(parent), attribute, plain)
    merged._hf_peft_config_loaded = False
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def _first_wrapper(model: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """Return the name and module of the first layer that peft wraps, or None.

    peft wraps layers with an adapter, layers that are trained as a whole, and layers of which some tokens are trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, wrappers)), None)


def _unwrapped(wrapper: Any) -> torch.nn.Module:
    """Return the plain layer that computes the same as a wrapper of peft in its present state."""
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        active = wrapper.active_adapters[0] if wrapper.active_adapters else None
        switched_off = wrapper.disable_adapters or active not in wrapper.modules_to_save
        return wrapper.original_module if switched_off else wrapper.modules_to_save[active]
    layer = wrapper.token_adapter if isinstance(wrapper, TrainableTokensWrapper) else wrapper
    if layer.disable_adapters or wrapper.disable_adapters:
        if layer.merged:
            layer.unmerge()
    elif hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    else:
        layer.merge(safe_merge=True)
    return layer.get_base_layer()


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a safetensors file, from its header.

    Args:
        path: The file.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 # no mapping


def _renamed(key: str, expected: Collection[str]) -> str:
    """Return the key without the wrappers under which the adapter was trained, as far as the model does not have it."""
    for pattern, replacement in _RENAMES:
        if key in expected:
            break
        key = re.sub(pattern, replacement, key)
    return key


def find_adapter(adapter: str | Path, **hub_options: Any) -> Path:
    """Return the folder of an adapter, after fetching it from the hub if needed and checking its settings and weights.

    Args:
        adapter: Directory or hub id.
        hub_options: As in `load_adapter`.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no safetensors weights.
        ValueError: Its settings ask for something that is refused here.
    """
    source = model_folder.find(adapter, "adapter", **hub_options)
    hub = {key: hub_options.get(key) for key in ("token", "cache_dir")}
    model_folder.fetch_weights(source, **hub, local_files_only=bool(hub_options.get("local_files_only")))
    model_folder.check_adapter_folder(source.folder)
    return source.folder


def _match_patterns(config: Any, model: torch.nn.Module, folder: Path) -> None:
    """Replace patterns by the names of the layers that they match; peft would match them without a time limit."""
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(config, key)
        if not isinstance(pattern, str) or pattern.lower() == "all-linear":
            continue
        path = folder / CONFIG_FILE
        matched = full_matches(pattern, names, path)
        if key == "target_modules" and not matched:
            raise Gen2EmbedError(f"{path}: the pattern {pattern[:80]!r} matches no layer of {type(model).__name__}")
        setattr(config, key, set(matched))


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / WEIGHTS_FILE))
