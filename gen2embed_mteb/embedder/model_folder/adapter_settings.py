"""Checks of an adapter's `adapter_config.json`.

The file comes from others, and peft imports modules and matches patterns that it names. Only known keys with known
kinds of values are accepted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.model_folder.settings import refuse
from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError, Tensor

MATCHING_SECONDS = 20
"""A pattern that takes longer than this on a model's layer names is treated as one that never ends."""

_TRAIN = "save the adapter again without it"


def check_adapter(path: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Check an adapter's settings before peft reads them.

    Args:
        path: The path of `adapter_config.json`, for messages.
        settings: The content of the file.
        tensors: The tensors of the adapter's weights.

    Raises:
        ModelFolderError: The adapter is neither LoRA nor DoRA, a key would import, fetch or copy something, the weights
            do not have the stated rank, or a pattern stands where a name is expected.
    """
    if settings.get("peft_type") != "LORA":
        raise refuse(path, f"peft_type is {settings.get('peft_type')!r}; LORA is read (DoRA is one)", _TRAIN)
    for key, value in settings.items():
        if value is None or value is False or value in ({}, []):
            continue
        check = _VALUES.get(key)
        if check is None:
            raise refuse(path, f"key {key!r} is refused: {str(value)[:80]}", _TRAIN)
        if not check(value):
            raise refuse(path, f"{key} is {str(value)[:80]}, which is not read", _TRAIN)
    widest = max((number for tensor in tensors.values() for number in tensor.shape), default=0)
    for rank in (settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()):
        if not _is_number(rank) or not 0 < rank <= widest:
            raise refuse(path, f"rank {str(rank)[:40]} is not that of the weights beside it", _TRAIN)


def full_matches(pattern: str, names: Iterable[str], path: Path) -> list[str]:
    """Return the names that a pattern matches as a whole; a separate process matches, since some patterns never end.

    Raises:
        ModelFolderError: The pattern is not valid, or matching it does not end.
    """
    program = (
        "import json, re, sys; pattern, names = json.load(sys.stdin); "
        "json.dump([name for name in names if re.fullmatch(pattern, name)], sys.stdout)"
    )
    try:
        done = subprocess.run(  # noqa: S603 # our own program
            [sys.executable, "-I", "-S", "-c", program],
            input=json.dumps([pattern, list(names)]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=MATCHING_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise refuse(path, f"the pattern {pattern[:80]!r} takes for ever to match", "list the layers' names") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["?"])[-1]
        raise refuse(path, f"{pattern[:80]!r} is not a pattern ({reason})", "list the layers' names")
    return [str(name) for name in json.loads(done.stdout)]


def base_of(path: Path, settings: dict[str, Any]) -> str:
    """Return the base model that an adapter names.

    Raises:
        ModelFolderError: It names no base model.
    """
    base = settings.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ModelFolderError(f"{path}: base_model_name_or_path is {str(base)[:80]!r}, which is no name")
    if not base:
        raise ModelFolderError(f"{path} names no base_model_name_or_path; pass the base model and adapter=")
    return base


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    """Return whether a value is the name of a layer, and not a pattern."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) is not None


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _are_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) and number >= 0 for number in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_true(value: Any) -> bool:
    return value is True


def _is_start(value: Any) -> bool:
    """Return whether a value names a way to initialise that needs no data and fetches nothing."""
    return value is True or (
        isinstance(value, str) and re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,3})?", value) is not None
    )


_VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("peft_type", "task_type", "peft_version", "revision", "base_model_name_or_path"), _is_text),
    "auto_mapping": lambda value: isinstance(value, dict),  # only peft's own loaders use it
    **dict.fromkeys(
        ("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), _is_true
    ),
    **dict.fromkeys(("r", "lora_alpha"), _is_number),
    "lora_dropout": lambda value: _is_number(value) and 0 <= value <= 1,
    "qalora_group_size": _is_number,  # belongs to use_qalora, which is refused
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "init_lora_weights": _is_start,
    "target_modules": lambda value: isinstance(value, str) or _are_names(value),
    "exclude_modules": lambda value: isinstance(value, str) or _are_names(value),
    "modules_to_save": _are_names,
    "layers_to_transform": lambda value: (isinstance(value, int) and value >= 0) or _are_indices(value),
    "layers_pattern": lambda value: _is_name(value) or _are_names(value),
    "rank_pattern": lambda value: isinstance(value, dict) and all(map(_is_name, value)),
    "alpha_pattern": lambda value: isinstance(value, dict) and all(map(_is_name, value)),
    "trainable_token_indices": lambda value: (
        _are_indices(value)
        or (isinstance(value, dict) and all(map(_is_name, value)) and all(map(_are_indices, value.values())))
    ),
    "megatron_core": lambda value: value == "megatron.core",  # peft's default, imported only with megatron_config
    "loftq_config": lambda value: isinstance(value, dict),  # read only with init_lora_weights "loftq"
}
