"""A base model and a LoRA adapter for vLLM, which puts adapters on the model while it serves (`--enable-lora`).

vLLM knows layers by their names in the generation model (`model.language_model.layers.0…`); an adapter that was trained
on the model without its head lacks the first `model.`. Of a Qwen2-VL, vLLM takes such a file without a word, and then
serves the base model's vectors under the adapter's name. So the adapter is written again under the names that it knows.
Families whose names were not compared with a running vLLM are refused, as is what it would not apply as a whole.
"""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gen2embed_mteb.embedder.export import empty_directory
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import WEIGHTS_FILE, shapes_in
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.embedder.readouts.readout import readout_of
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.new_folder import new_folder

if TYPE_CHECKING:
    import torch

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` takes."""
_TRIED = ("qwen2_vl",)
"""The model types whose vectors a running vLLM gave with an adapter beside them (`tests/serving/test_lora.py`)."""
_LAYER = re.compile(r"(.*\.layers\.\d+\..+)\.lora_[AB]\.weight")


class ForVllm(NamedTuple):
    """What was written.

    Attributes:
        base: The folder of the base model with the prompt.
        adapter: The folder of the adapter.
        flags: The flags of `vllm serve` that belong to the adapter, which is named like its folder.
    """

    base: Path
    adapter: Path
    flags: str

    def told(self) -> str:
        """Return what was written and how it is served, in sentences."""
        return (
            f"Written to {self.base} and {self.adapter}.\n"
            f"Serve both: vllm serve {shlex.quote(str(self.base))} --runner pooling --convert embed {self.flags}"
        )


def export_for_vllm(
    model: str | Path,
    output_dir: str | Path,
    adapter_dir: str | Path,
    *,
    adapter: str | Path | None,
    prompt_mode: str | HierarchicalPrompt | None = None,
    **options: Any,
) -> ForVllm:
    """Write a base model and its adapter, not merged.

    Args:
        model: Hub id or local directory of the base model.
        output_dir: Where to write the base model, with the prompt of `prompt_mode`; missing or empty. An adapter does
            not state its prompt: pass the one that it was trained with.
        adapter_dir: Where to write the adapter; missing or empty.
        adapter: Hub id or directory of the LoRA adapter.
        prompt_mode: As for `export`.
        options: Further arguments of `Gen2Embed`.

    Raises:
        FileExistsError: One of the folders is not empty.
        Gen2EmbedError: No adapter is given; or vLLM cannot apply all of it, so that it must be merged.
        OSError: The disk is full.
    """
    if not adapter:
        raise Gen2EmbedError("--vllm_adapter needs --adapter: there is nothing to serve beside the base model")
    base, target = empty_directory(output_dir), empty_directory(adapter_dir)
    if base.resolve().is_relative_to(target.resolve()):
        raise Gen2EmbedError(f"{target} would hold the base model as well as the adapter; name another --vllm_adapter")
    tuned = Gen2Embed(model, adapter=adapter, prompt_mode=prompt_mode, **options)
    weights, config = _servable(tuned, str(adapter))
    plain = Gen2Embed(model, prompt_mode=prompt_mode, **options)
    if plain.calibration is not None or [type(one) for one in plain] != [type(one) for one in tuned]:
        raise Gen2EmbedError(
            f"{model}: it has modules behind pooling, such as a calibration, that do not belong to the adapter, and "
            "vLLM would apply them to its vectors; pass the model without them, or merge: leave --vllm_adapter out"
        )
    plain.save_pretrained(str(base))
    with new_folder(target, "export") as folder:
        _write(weights, config, folder)
    rank = next(rank for rank in _RANKS if rank >= config.r)
    module = shlex.quote(f"{target.resolve().name}={target}")
    flags = f"--enable-lora --max-lora-rank {rank} --lora-modules {module}"
    return ForVllm(base, target, flags)


def _servable(tuned: Gen2Embed, source: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the weights of the attached adapter under vLLM's names, and its configuration for peft."""
    from peft import get_peft_model_state_dict

    model = tuned[0].model
    (config,) = model.peft_config.values()
    decoder = model.get_decoder()
    inside = next(name for name, module in model.named_modules() if module is decoder)
    weights = get_peft_model_state_dict(model)
    outside = [key for key in weights if not (_LAYER.fullmatch(key) and key.startswith(f"{inside}."))]
    faults = {
        f"it is for the model type {model.config.model_type!r}; {', '.join(_TRIED)} alone was compared with vLLM": (
            model.config.model_type not in _TRIED
        ),
        "it is a DoRA adapter": config.use_dora,
        f"its type is {getattr(config.peft_type, 'value', config.peft_type)}": config.peft_type != "LORA",
        "it has ranks or factors of single layers": bool(config.rank_pattern or config.alpha_pattern),
        "it trains whole modules": bool(config.modules_to_save),
        "it trains tokens": bool(config.trainable_token_indices),
        "it trains biases": config.bias != "none" or config.lora_bias,
        f"it began as {config.init_lora_weights!r}, which may change the base": (
            config.init_lora_weights not in (True, False, "gaussian")
        ),
        f"its rank {config.r} is above {_RANKS[-1]}": config.r > _RANKS[-1],
        f"it changes {outside[0] if outside else ''}, which is no layer of the language model": bool(outside),
        f"it was trained with readout={readout_of(model).state!r}": readout_of(model) != Readout(),
    }
    for reason, found in faults.items():
        if found:
            raise Gen2EmbedError(
                f"{source}: vLLM cannot apply all of this adapter while it serves ({reason}); merge it: leave "
                "--vllm_adapter out"
            )
    config = copy.copy(config)
    config.inference_mode = True
    # Whole names: other parts of the model have layers that are called alike.
    config.target_modules = sorted({key.rpartition(".lora_")[0] for key in weights})
    named = {f"base_model.model.model.{key}": value.detach().cpu().contiguous() for key, value in weights.items()}
    return named, config


def _write(weights: dict[str, torch.Tensor], config: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    if shapes_in(folder / WEIGHTS_FILE) != {key: tuple(value.shape) for key, value in weights.items()}:
        raise Gen2EmbedError(f"{folder / WEIGHTS_FILE}: its weights are not those that were written; check the disk")
