"""Adding models and tasks to mteb's registries, which have no entry point for other packages.

mteb builds its registries from its own files when it is imported. They are plain dictionaries and module attributes:
our entries are added after mteb's, and no entry of mteb is replaced. Benchmarks are added when mteb imports its own
(`tasks/benchmarks.py`). mteb would treat a `Gen2Embed` object as a text model, like every `SentenceTransformer`; so its
wrapper is changed to return our encoder for such an object.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gen2embed_mteb.names import DEFAULT


def install() -> None:
    """Register our models and tasks in mteb; calling it twice changes nothing.

    If one step fails, the other steps still register what they can.

    Raises:
        FileNotFoundError, ValueError: GEN2EMBED_MODEL names a directory that is missing, or that is not a model's.
        RuntimeError: This mteb is damaged, or newer than Gen2Embed supports. The message says what to install.
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
    from gen2embed_mteb.mteb_plugin.models.model_metas import RERANKER, as_meta

    registry = _registry()
    for model in (*models.HUB_MODELS, models.mini()):
        for ending in ("", RERANKER):
            meta = registry.setdefault(f"{model.name}{ending}", as_meta(model, reranker=bool(ending)))
            for alias in model.aliases:
                registry.setdefault(f"{alias}{ending}", meta)


def _add_chosen() -> None:
    """Register the names `gen2embed` and `gen2embed-reranker` for the model that GEN2EMBED_MODEL names."""
    from gen2embed_mteb.mteb_plugin.models import model_table as models
    from gen2embed_mteb.mteb_plugin.models.model_metas import RERANKER, as_meta

    registry = _registry()
    for ending in ("", RERANKER):  # if the next steps fail, the names should be unknown, not another model
        registry.pop(f"{DEFAULT}{ending}", None)
    chosen = models.chosen()
    for ending in ("", RERANKER):
        # A directory may have the name of a model in the table, although it is another model.
        name = f"{chosen.name}{ending}"
        meta = registry.get(name)
        if meta is None or meta.loader_kwargs["source"] != chosen.source:
            meta = as_meta(chosen, reranker=bool(ending))
            registry.setdefault(name, meta)
        registry[f"{DEFAULT}{ending}"] = meta


def _add_objects() -> None:
    """Let `mteb.evaluate(Gen2Embed(…))` evaluate images too, with the scores of the same model in the registry."""
    wrapper = import_module("mteb.models.sentence_transformer_wrapper").SentenceTransformerEncoderWrapper
    stock = wrapper.__new__
    if hasattr(stock, "_knows_gen2embed"):
        return

    def __new__(cls: Any, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        ours = sys.modules.get("gen2embed_mteb.embedder.model")  # if it was not imported, there are no objects of it
        if ours is not None and isinstance(model, ours.Gen2Embed):
            from gen2embed_mteb.mteb_plugin.models.model_metas import wrap

            return wrap(model)
        return stock(cls)

    __new__._knows_gen2embed = True  # type: ignore[attr-defined]
    wrapper.__new__ = __new__


def _add_tasks() -> None:
    from gen2embed_mteb.mteb_plugin.tasks import caption_tasks, mmeb_tasks, retrieval_tasks

    # Import by name: `mteb.get_tasks` is also a function, which hides the module.
    tasks: Any = import_module("mteb.get_tasks")
    ours: tuple[Any, ...] = (
        *mmeb_tasks.TASKS["MMEB"],
        *mmeb_tasks.TASKS["MMEB-mini"],
        *caption_tasks.TASKS,
        *retrieval_tasks.TASKS,
    )
    new = [task for task in ours if task.metadata.name not in tasks._TASKS_REGISTRY]
    tasks._TASKS_REGISTRY.update({task.metadata.name: task for task in new})
    tasks.TASK_LIST = (*tasks.TASK_LIST, *new)
