"""Building stock sentence-transformers modules for a base model or an adapter.

The whole method is expressed in stock parts: a Jinja chat template that contains the two-level prompt, last-token
pooling, and L2 normalisation. Saved, these parts load with plain `SentenceTransformer`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.embedder.families import ImageLayout, chat_template, check_layout, check_num_crops, family_of
from gen2embed_mteb.embedder.model_folder import adapters, compat
from gen2embed_mteb.embedder.model_folder import checks as model_folder
from gen2embed_mteb.embedder.model_folder.supported import check_supported
from gen2embed_mteb.embedder.prompts.strategies import DEFAULT, HierarchicalPrompt, strategy
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

PIXELS = {"use_fast": False}
"""Pillow resizes images even where torchvision is installed: torchvision resamples differently, by 1e-3 in a vector.

The newer option `backend="pil"` of transformers means the same, but it is also passed to the video processor, which
does not support it."""

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""The files of which a model that takes images has one, besides its tokenizer's."""

TEMPLATES_FOLDER = "additional_chat_templates"
"""The folder in which tokenizers keep further chat templates."""


def modules_for(
    name_or_path: str | Path,
    *,
    prompt_mode: str | HierarchicalPrompt = DEFAULT,
    layout: ImageLayout = "native",
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    config_kwargs: dict[str, Any] | None = None,
) -> list[nn.Module]:
    """Return the modules Transformer, Pooling and Normalize for a base model with a prompt.

    Args:
        name_or_path: Hub id or local directory of a base model, or of an adapter, whose base is then loaded too.
        prompt_mode: The name of a strategy, or a prompt of the caller's own.
        layout: How images are laid out in the prompt; `official` and `raw` only for families written by hand.
        adapter: Hub id or directory of an adapter to attach to the base model.
        gguf_file: A GGUF file of the folder that holds configuration, tokenizer and weights of a text-only model.
        token: Hub token.
        cache_folder: Where hub files are kept.
        revision: Branch, tag or commit of `name_or_path` on the hub.
        trust_remote_code: Whether Python code of the model's folder may run.
        local_files_only: Whether to use only files on this machine.
        model_kwargs: Passed to `AutoModel.from_pretrained`.
        processor_kwargs: Passed to `AutoProcessor.from_pretrained`.
        config_kwargs: Passed to `AutoConfig.from_pretrained`.

    Raises:
        FileNotFoundError: There is no such folder, and no such model on the hub.
        ValueError: The prompt mode is unknown, the type of model cannot be used (see `supported`), no chat format fits
            its template, a file is refused (see `checks`), the weights are not those of the architecture, or the keys
            of the adapter do not fit.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    from gen2embed_mteb.embedder.model_folder.checked_loading import CheckedTransformer, load_config

    prompt = strategy(prompt_mode)
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_folder, "local_files_only": local_files_only}
    source = model_folder.find(name_or_path, **hub, revision=revision)
    base = model_folder.find_base(source, **hub)
    if base is not None:
        if adapter is not None:
            raise Gen2EmbedError(
                f"{name_or_path} is itself an adapter; pass its base model {base.name} with adapter={adapter}"
            )
        model_folder.fetch_weights(source, **hub)
        adapter = source.folder
        logger.info("adapter %s on its base model %s", source.name, base.name)
        source = base
    elif adapter is not None:
        adapter = adapters.find_adapter(adapter, **hub)
    model_folder.fetch_weights(source, **hub, gguf_file=gguf_file)
    model_folder.check(source, trust_remote_code=trust_remote_code, gguf_file=gguf_file)

    compat.install()
    if source.revision is not None and not trust_remote_code:
        hub["local_files_only"] = True  # no file is fetched that was not checked
    shared = {**hub, "revision": source.revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        shared["gguf_file"] = gguf_file
    config = load_config(source, {**shared, **(config_kwargs or {})})
    family = family_of(config.model_type)
    check_layout(family, layout)
    has_default_crops = check_num_crops(family, processor_kwargs)
    check_supported(config)  # before the weights are read
    options = processor_options(source, shared)
    tries_own = layout == "native" and family.tries_own_template
    if not tries_own:
        options["chat_template"] = chat_template(family, prompt, layout)
    with compat.quiet_loading():
        transformer = CheckedTransformer(
            source.name,
            prompt=prompt if tries_own else None,
            config=config,
            model_kwargs={**shared, **(model_kwargs or {})},
            processor_kwargs={**options, **(processor_kwargs or {})},
            config_kwargs={**shared, **(config_kwargs or {})},
            processing_kwargs=family.processing_kwargs,
            unpad_inputs=False,
        )
    if has_default_crops:
        logger.warning(
            "%s: num_crops is %d, as its folder says; 16 is advised for single pictures, and the paper's figures were "
            "most likely made with it: --num_crops 16, or processor_kwargs={'num_crops': 16}",
            source.name,
            transformer.processor.image_processor.num_crops,
        )
    transformer.tokenizer.init_kwargs.pop("gguf_file", None)  # it would be saved with the tokenizer
    if adapter is not None:
        adapters.load_adapter(transformer.model, adapter)
    dimension = transformer.get_embedding_dimension()
    return [transformer, Pooling(dimension, pooling_mode="lasttoken"), Normalize()]


def processor_options(source: model_folder.Source, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `AutoProcessor.from_pretrained`: with images, that Pillow resizes them.

    For a tokenizer alone, the chat template of a `chat_template.json` is among them: transformers reads that file for
    processors, but not for tokenizers.

    Args:
        source: The model.
        shared: The options that all loaders of transformers get.
    """
    if _has_images(source.folder):
        return {**shared, **PIXELS}
    template = _template_of_processors(source.folder)
    return dict(shared) if template is None else {**shared, "chat_template": template}


def text_alone(name_or_path: str | Path, *, revision: str | None = None, gguf_file: str | None = None) -> str:
    """Return why a model takes no images, judged by its files; an empty text if it takes them. No weights are read.

    Args:
        name_or_path: Hub id or directory of a base model, an export or an adapter.
        revision: Branch, tag or commit on the hub.
        gguf_file: The GGUF file of the folder that is to be loaded.

    Raises:
        FileNotFoundError: There is no such model.
        ModelFolderError: The files do not say which base model an adapter is for.
    """
    name = model_folder.as_given(name_or_path)
    hub: dict[str, Any] = {"token": None, "cache_dir": None, "local_files_only": Path(name).is_dir()}
    source = model_folder.find(name, **hub, revision=revision)
    source = model_folder.find_base(source, **hub) or source
    if gguf_file is None and _has_images(source.folder):
        return ""
    return f"{name} takes text alone (it has no image processor)"


def width_by_files(
    name_or_path: str | Path, *, revision: str | None = None, gguf_file: str | None = None
) -> int | None:
    """Return the number of dimensions of a model's vectors, judged by its files; `None` if they do not say.

    No weights are read.

    Args:
        name_or_path: Hub id or directory of a base model, an export or an adapter.
        revision: Branch, tag or commit on the hub.
        gguf_file: The GGUF file of the folder that is to be loaded.

    Raises:
        FileNotFoundError: There is no such model.
        ModelFolderError: The files do not say which base model an adapter is for.
    """
    from gen2embed_mteb.embedder.model_folder.checked_loading import load_config

    name = model_folder.as_given(name_or_path)
    hub: dict[str, Any] = {"token": None, "cache_dir": None, "local_files_only": Path(name).is_dir()}
    source = model_folder.find(name, **hub, revision=revision)
    source = model_folder.find_base(source, **hub) or source
    if gguf_file is not None or any(source.folder.glob("*_Dense")) or any(source.folder.glob("*_Router")):
        return None
    try:
        config = load_config(source, {**hub, "revision": source.revision, "trust_remote_code": False})
    except Gen2EmbedError:
        return None  # loading it says what is wrong
    width = getattr(config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else None


def _has_images(folder: Path) -> bool:
    return any((folder / name).is_file() for name in IMAGE_FILES)


def _template_of_processors(folder: Path) -> Any:
    """Return the template in `chat_template.json`; `None` if there is none, or the tokenizer has one of its own."""
    path, tokenizer = folder / model_folder.TEMPLATE_FILE, folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "chat_template.jinja").is_file() or (folder / TEMPLATES_FOLDER).is_dir():
        return None
    if tokenizer.is_file() and model_folder.read_settings(tokenizer).get("chat_template"):
        return None
    found = model_folder.read_settings(path).get("chat_template")
    return {one["name"]: one["template"] for one in found} if isinstance(found, list) else found
