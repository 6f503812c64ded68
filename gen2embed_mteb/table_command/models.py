"""What the files of a model say without its weights: its family, and whether it takes a prompt and a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.families import Family, chat_template, check_layout, check_num_crops, family_of
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.embedder.short_names import resolve


def check_model(name: str, prompt_mode: str, layout: str, num_crops: int | None) -> None:
    """Refuse a model that cannot be used with a prompt and a layout, by its files without the weights.

    Args:
        name: Hub id, directory or short name of a base model, an adapter or an export.
        prompt_mode: The strategy.
        layout: The image layout.
        num_crops: The tiles of an image, if they are given.

    Raises:
        FileNotFoundError: There is no such model.
        Gen2EmbedError: It is of a type that cannot be used, or does not have this layout or setting.
    """
    from gen2embed_mteb.inspection.prompt_inspection import inspect_prompt

    inspect_prompt(name, prompt_mode=prompt_mode)
    family = family_of_model(name)
    check_layout(family, layout)
    if layout == "raw":
        chat_template(family, strategy(prompt_mode), "raw")
    check_num_crops(family, {"num_crops": num_crops})


def family_of_model(name: str) -> Family:
    """Return the family of a model, by its files without the weights.

    Args:
        name: As in `check_model`.
    """
    from gen2embed_mteb.embedder.model_folder import checks as model_folder
    from gen2embed_mteb.embedder.model_folder.checked_loading import load_config

    place = resolve(name) or model_folder.as_given(name)
    hub: dict[str, Any] = {"token": None, "cache_dir": None, "local_files_only": Path(place).is_dir()}
    source = model_folder.find(place, **hub)
    source = model_folder.find_base(source, **hub) or source
    return family_of(load_config(source, {**hub, "revision": source.revision}).model_type)
