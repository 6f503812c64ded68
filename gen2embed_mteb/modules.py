"""Stock sentence-transformers modules for a base model or an adapter.

The whole method is expressed in stock parts: a Jinja chat template that carries the two-level prompt, last-token
pooling, and L2 normalisation. What is saved of them loads with plain `SentenceTransformer`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen2embed_mteb import compat
from gen2embed_mteb.adapters import CONFIG_FILE, load_adapter
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.families import ImageLayout, chat_template, family_of
from gen2embed_mteb.prompts import DEFAULT, HierarchicalPrompt, strategy

if TYPE_CHECKING:
    from torch import nn

PIXELS = {"use_fast": False}
"""Images are resized by Pillow, also where torchvision is installed: that resamples differently, by 1e-3 in a vector.

The newer `backend="pil"` of transformers says the same, but reaches the video processor too, which has none."""


def modules_for(
    name_or_path: str | Path,
    *,
    prompt_mode: str | HierarchicalPrompt = DEFAULT,
    layout: ImageLayout = "native",
    adapter: str | Path | None = None,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    model_kwargs: dict[str, Any] | None = None,
    processor_kwargs: dict[str, Any] | None = None,
    config_kwargs: dict[str, Any] | None = None,
) -> list[nn.Module]:
    """The modules Transformer, Pooling and Normalize of a base model under a prompt.

    Args:
        name_or_path: hub id or local directory of a base model, or of an adapter, whose base is then loaded too.
        prompt_mode: a strategy's name, or a prompt of one's own.
        layout: how images are laid out in the prompt; see `families.chat_template`.
        adapter: hub id or directory of an adapter to attach to the base model.
        token: hub token.
        cache_folder: where hub files are kept.
        revision: of `name_or_path`.
        trust_remote_code: passed on; off by default.
        local_files_only: no network.
        model_kwargs: passed to `AutoModel.from_pretrained`.
        processor_kwargs: passed to `AutoProcessor.from_pretrained`.
        config_kwargs: passed to `AutoConfig.from_pretrained`.

    Raises:
        ValueError: unknown prompt mode, unknown family, or an adapter whose keys do not fit.
    """
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoConfig

    prompt, name_or_path = strategy(prompt_mode), str(name_or_path)
    hub = {"token": token, "revision": revision, "local_files_only": local_files_only}
    base_of = _base_of_adapter(name_or_path, hub | {"cache_dir": cache_folder})
    if base_of is not None:
        if adapter is not None:
            raise Gen2EmbedError(
                f"{name_or_path} is itself an adapter; pass its base model {base_of} with adapter={adapter}"
            )
        adapter, name_or_path = name_or_path, base_of
        adapter_hub, hub = hub, {**hub, "revision": None}
    else:
        adapter_hub = {**hub, "revision": None}

    compat.install()
    shared = {**hub, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name_or_path, cache_dir=cache_folder, **{**shared, **(config_kwargs or {})})
    family = family_of(config.model_type)  # refuses unknown families before the weights are read
    template = chat_template(family, prompt, layout)
    with compat.quiet_loading():
        transformer = Transformer(
            name_or_path,
            cache_dir=cache_folder,
            model_kwargs={**shared, **(model_kwargs or {})},
            processor_kwargs={**shared, **PIXELS, "chat_template": template, **(processor_kwargs or {})},
            config_kwargs={**shared, **(config_kwargs or {})},
            processing_kwargs=family.processing_kwargs,
            unpad_inputs=False,
        )
    prepare_tokenizer(transformer.tokenizer)
    if adapter is not None:
        load_adapter(transformer.model, adapter, cache_dir=cache_folder, **adapter_hub)
    dimension = transformer.get_embedding_dimension()
    return [transformer, Pooling(dimension, pooling_mode="lasttoken"), Normalize()]


def prepare_tokenizer(tokenizer: Any) -> None:
    """Leave no truncation or padding state of earlier calls behind, as a tokenizer saved now would carry it along."""
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()


def _base_of_adapter(name_or_path: str, hub: dict[str, Any]) -> str | None:
    """The base model of an adapter; `None` if `name_or_path` is no adapter."""
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(name_or_path, **hub)
    if found is None:
        return None
    settings = json.loads(Path(found).read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise Gen2EmbedError(
            f"{Path(found).parent / CONFIG_FILE} names no base_model_name_or_path; pass the base model and adapter="
        )
    return str(base)
