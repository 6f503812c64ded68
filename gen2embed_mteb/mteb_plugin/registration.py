"""Putting models and tasks into mteb's registries, which have no entry point for others.

mteb builds its registries when it is imported, from its own files. They are plain dictionaries and module attributes:
ours are added behind mteb's, and nothing of mteb's is replaced. Benchmarks follow when mteb imports its own
(`benchmarks.py`). A `Gen2Embed` that is handed to mteb as it is, mteb would take for a text model, as it does every
`SentenceTransformer`; asked to wrap one, its wrapper gives our encoder.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gen2embed_mteb.names import DEFAULT


def install() -> None:
    """Teach mteb our models and tasks. Idempotent.

    What can be registered is, whatever fails beside it.

    Raises:
        FileNotFoundError, ValueError: GEN2EMBED_MODEL names a directory that is not there, or not a model's.
        RuntimeError: This mteb is not one that Gen2Embed knows: damaged, or newer. The message says what to install.
    """
    steps = {"models": _add_models, "tasks": _add_tasks, "Gen2Embed objects": _add_objects}
    errors = {what: _attempt(step) for what, step in steps.items()}
    chosen_error = None if errors["models"] else _attempt(_add_chosen)
    failures = [f"{what}: {type(error).__name__}: {error}" for what, error in errors.items() if error]
    if failures:
        raise RuntimeError(
            f"this is mteb {_version()}, where some of Gen2Embed's could not be registered ({'; '.join(failures)}); "
            "install one that it was tested with: pip install 'mteb>=2.26,<3'"
        )
    if chosen_error:
        raise chosen_error


def _attempt(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except Exception as error:  # a mteb that changed can fail anywhere; the other steps may still work
        return error
    return None


def _version() -> str:
    try:
        return importlib.metadata.version("mteb")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _registry() -> dict[str, Any]:
    return import_module("mteb.models.model_implementations").MODEL_REGISTRY


def _add_models() -> None:
    from gen2embed_mteb.mteb_plugin.models import model_table as models
    from gen2embed_mteb.mteb_plugin.models.model_metas import as_meta

    registry = _registry()
    for model in (*models.HUB_MODELS, models.mini()):
        meta = registry.setdefault(model.name, as_meta(model))
        for alias in model.aliases:
            registry.setdefault(alias, meta)


def _add_chosen() -> None:
    """Let `gen2embed` stand for what GEN2EMBED_MODEL names."""
    from gen2embed_mteb.mteb_plugin.models import model_table as models
    from gen2embed_mteb.mteb_plugin.models.model_metas import as_meta

    registry = _registry()
    registry.pop(DEFAULT, None)  # rather unknown than another model, if what follows fails
    chosen = models.chosen()
    # A directory may be called as a model of the table is, and is another model all the same.
    meta = registry.get(chosen.name)
    if meta is None or meta.loader_kwargs["source"] != chosen.source:
        meta = as_meta(chosen)
        registry.setdefault(chosen.name, meta)
    registry[DEFAULT] = meta


def _add_objects() -> None:
    """Let `mteb.evaluate(Gen2Embed(…))` evaluate images, too: the scores of the same model in the registry."""
    wrapper = import_module("mteb.models.sentence_transformer_wrapper").SentenceTransformerEncoderWrapper
    stock = wrapper.__new__
    if hasattr(stock, "_knows_gen2embed"):
        return

    def __new__(cls: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        ours = sys.modules.get("gen2embed_mteb.embedder.model")  # where it was not imported, there is no object of it
        if ours is not None and isinstance(model, ours.Gen2Embed):
            from gen2embed_mteb.mteb_plugin.models.model_metas import wrap

            return wrap(model)
        return stock(cls)

    __new__._knows_gen2embed = True  # type: ignore[attr-defined]
    wrapper.__new__ = __new__


def _add_tasks() -> None:
    from gen2embed_mteb.mteb_plugin.tasks import caption_tasks, mmeb_tasks

    # By module name: `mteb.get_tasks` is also a function, and hides the module.
    tasks: Any = import_module("mteb.get_tasks")
    ours: tuple[Any, ...] = (*mmeb_tasks.TASKS["MMEB"], *mmeb_tasks.TASKS["MMEB-mini"], *caption_tasks.TASKS)
    new = [task for task in ours if task.metadata.name not in tasks._TASKS_REGISTRY]
    tasks._TASKS_REGISTRY.update({task.metadata.name: task for task in new})
    tasks.TASK_LIST = (*tasks.TASK_LIST, *new)
