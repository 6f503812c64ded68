"""The short names ``gen2embed`` and ``gen2embed-mini``, and the patch that lets ``SentenceTransformer`` take them.

A short name stands for a *base* model, which sentence-transformers alone would load with mean pooling and no prompt. So
two things happen, for these names only: the name is replaced by the model that it stands for, and if that model has no
``modules.json`` (it is not an exported model), ``model_folder.loading.modules_for`` builds the modules with the
hierarchical prompt. Everything else (revisions, tokens, devices, device maps) is left to sentence-transformers.
"""

import os
from functools import partial, wraps
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import DEFAULT, DEFAULT_MODEL, MINI, MINI_FOLDER, MODEL_VARIABLE


def resolve(name: object) -> str | None:
    """Return the model that a short name stands for.

    Args:
        name: The model name that a user gave.

    Returns:
        A hub id or a local directory; ``None`` if ``name`` is not a short name, or if a folder of that name exists,
        which always takes precedence.

    Raises:
        FileNotFoundError: ``GEN2EMBED_MODEL`` is a path, and there is no directory there.
    """
    if name not in (DEFAULT, MINI) or Path(str(name)).is_dir():
        return None
    chosen = os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    if MINI in (name, chosen):
        return str(MINI_FOLDER)
    if chosen == DEFAULT:  # pointing the name at itself means the default
        return DEFAULT_MODEL
    if chosen.startswith((".", "~", os.sep)):
        directory = Path(chosen).expanduser()
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{MODEL_VARIABLE}={chosen} is not a directory. Point it at an exported model, a base model or a hub "
                f"id, or unset it for {DEFAULT_MODEL}."
            )
        return str(directory)
    return chosen


def install() -> None:
    """Let ``SentenceTransformer`` (and its subclasses) take the short names; calling it twice changes nothing."""
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer.__init__
    if hasattr(stock, "_knows_short_names"):
        return

    @wraps(stock)
    def __init__(self: Any, model_name_or_path: str | None = None, *args: Any, **kwargs: Any) -> None:
        target = resolve(model_name_or_path)
        if target is None:
            stock(self, model_name_or_path, *args, **kwargs)
            return
        if Path(target).is_dir():
            kwargs.setdefault("local_files_only", True)  # no look-ups for a model card: a directory works offline
        # For a subclass that builds its own modules (Gen2Embed), only the name is replaced.
        if type(self)._load_default_modules is SentenceTransformer._load_default_modules:
            # The methods are replaced on this instance only, and only while it loads: the class stays as it is, and
            # the instance can be pickled.
            self.__dict__.update(_loaders(self))
        try:
            stock(self, target, *args, **kwargs)
        finally:
            for name in _SHADOWED:
                self.__dict__.pop(name, None)

    __init__._knows_short_names = True  # type: ignore[attr-defined]
    SentenceTransformer.__init__ = __init__


_SHADOWED = ("_load_modules", "_load_default_modules", "_module_classes")


def _loaders(model: Any) -> dict[str, Any]:
    """Return replacements for a model's loading methods: they check every file before it is read."""
    from gen2embed_mteb.embedder.model_folder.checked_loading import load_modules, module_classes

    stock = model._load_modules
    return {
        "_load_modules": partial(load_modules, model, stock),
        "_load_default_modules": partial(_load_default_modules, model),
        "_module_classes": module_classes(),
    }


def _load_default_modules(model: Any, name: str, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Replace ``SentenceTransformer._load_default_modules``, which loads models without ``modules.json``."""
    from gen2embed_mteb.embedder.model_folder.loading import modules_for

    if model.backend != "torch":
        raise Gen2EmbedError(
            f"backend={model.backend!r} needs an exported model: run `gen2embed export {name} OUT` and load OUT."
        )
    modules = modules_for(name, **kwargs)
    if not kwargs.get("local_files_only"):
        model.model_card_data.set_base_model(name, revision=kwargs.get("revision"))
    return modules, {}
