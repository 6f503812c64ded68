"""PEFT adapters (LoRA, DoRA) on a base model: loading that checks every key, and merging.

transformers loses DoRA's magnitudes when it loads an adapter, and ignores keys it does not know. Here the weights are
set by peft itself, and a key that is missing or left over is an error.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Wrappers under which adapters were trained, taken off in this order: peft's own, the generation head's, and older
# layouts of transformers that kept the language model at the root (Qwen2-VL) or in a wrapper of its own (LLaVA).
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.model\.", ""),
    (r"^model\.", ""),
    (r"^(?=layers\.)", "language_model."),
    (r"^language_model\.model\.", "language_model."),
)


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether an adapter is attached to any layer of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def load_adapter(model: torch.nn.Module, adapter: str | Path, **hub_options: Any) -> None:
    """Attach an adapter to a base model, in place.

    Args:
        model: the base model, as `AutoModel` loads it.
        adapter: directory or hub id with `adapter_config.json` and `adapter_model.safetensors`.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, where the adapter is on the hub.

    Raises:
        FileNotFoundError: the directory holds no safetensors weights.
        ValueError: a key of the adapter has no place in the model, or the model expects one that is not there.
    """
    from peft import PeftConfig, inject_adapter_in_model

    # Read before the model is changed: an unreadable adapter leaves the model as it was.
    state = _read_weights(adapter, hub_options)
    config = PeftConfig.from_pretrained(str(adapter), **hub_options)
    config.inference_mode = True
    inject_adapter_in_model(config, model)
    set_adapter_weights(model, state, str(adapter))
    model.eval()


def reload_adapter(model: torch.nn.Module, adapter: str | Path, **hub_options: Any) -> None:
    """Set the weights of an adapter that is attached already, every key checked; arguments as in `load_adapter`."""
    set_adapter_weights(model, _read_weights(adapter, hub_options), str(adapter))


def set_adapter_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Set the weights of the attached adapter.

    Raises:
        ValueError: a missing or an unexpected key, or a shape that differs; the message names `source` and the keys.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model)
    best = {_renamed(key): value for key, value in state.items()}
    missing, unexpected = sorted(set(expected) - set(best)), sorted(set(best) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"adapter {source} does not fit {type(model).__name__}: {len(missing)} missing keys {missing[:3]}, "
            f"{len(unexpected)} unexpected keys {unexpected[:3]}. Load it on the base model it was trained on."
        )
    differing = [key for key in expected if expected[key].shape != best[key].shape]
    if differing:
        raise ValueError(
            f"adapter {source} does not fit {type(model).__name__}: {differing[0]} has shape "
            f"{tuple(best[differing[0]].shape)}, the model expects {tuple(expected[differing[0]].shape)}."
        )
    set_peft_model_state_dict(model, best)


def merged_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model with its adapter folded into the base weights; the model itself is not touched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, attribute = name.rpartition(".")
            setattr(merged.get_submodule(parent), attribute, module.get_base_layer())
    merged._hf_peft_config_loaded = False
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def _renamed(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _read_weights(adapter: str | Path, hub_options: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if Path(adapter).is_dir():
        path = Path(adapter) / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} not found: an adapter needs {WEIGHTS_FILE}; pickled .bin weights are not read, convert them"
            )
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(str(adapter), WEIGHTS_FILE, **hub_options))
    return dict(load_file(path))
