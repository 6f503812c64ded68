"""The families of multimodal LLMs: one record per family, and its chat template, which renders the two-level prompt.

A model of any other type gets a generic record, and its own chat template carries the prompt (see `chat_formats`). A
family is written by hand where published figures depend on its template, or for the `official` layout; it may still
prefer a model's own template in the native layout (`prefers_own_template`).

To add one, write a file with its record beside this one, an entry in `FAMILIES`, and a template in `templates/`. The
template gets the prompt's texts (`prompt`), the side (`task`) and the conversation, and renders one user turn and the
beginning of the assistant turn (see `chat_template`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.embedder.chat_formats.header import caller_template, parts_of, prompt_of, with_phrase
from gen2embed_mteb.embedder.families.family import Family, ImageLayout
from gen2embed_mteb.embedder.families.generic import generic_family
from gen2embed_mteb.embedder.families.llava_next import LLAVA_NEXT
from gen2embed_mteb.embedder.families.phi3_v import PHI3_V
from gen2embed_mteb.embedder.families.qwen import QWEN
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError

__all__ = [
    "FAMILIES",
    "OWN_CLASSES",
    "Family",
    "ImageLayout",
    "carried_by_own",
    "chat_template",
    "check_layout",
    "check_num_crops",
    "family_of",
    "prompt_of",
]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*QWEN, LLAVA_NEXT, PHI3_V)}

OWN_CLASSES = frozenset(name for family in FAMILIES.values() for name in family.own_classes)
"""Names of classes of this package that the files of models name."""


def family_of(model_type: str) -> Family:
    """Return the family of a model: the one written by hand, or else a generic one.

    Args:
        model_type: `config.model_type` of the loaded model.
    """
    return FAMILIES.get(model_type) or generic_family(model_type)


def chat_template(family: Family, prompt: HierarchicalPrompt, layout: ImageLayout = "native") -> str:
    """Return the Jinja chat template that renders this prompt for this family.

    The template does not depend on this package: stock processors render it, with `task` ("query", "document" or
    undefined) and `add_generation_prompt` as variables. Its first line holds the prompt as JSON, which `prompt_of`
    reads back.

    Args:
        family: The family whose chat format is used.
        prompt: The texts.
        layout: `native`, the family's own image marker; `official`, the bare one; `raw`, the bare one without turns.

    Raises:
        Gen2EmbedError: The layout is unknown, the family is generic, or the prompt needs a turn that `raw` has not.
    """
    check_layout(family, layout)
    if layout == "raw" and (prompt.query_system or prompt.document_system or "caller" in prompt.texts):
        raise Gen2EmbedError(
            f"layout='raw' has no turns, and prompt_mode {prompt.name!r} says something in a turn of its own: pass "
            "prompt_mode='none', or one with texts at user level alone, such as 'unime'"
        )
    if family.is_generic:
        raise Gen2EmbedError(f"{family.name} has no template of ours: its own carries the prompt (see `chat_formats`)")
    marker = family.image if layout == "native" else family.bare_image
    # JSON strings are Jinja strings as long as non-ASCII characters stay as they are.
    texts = json.dumps(prompt.texts, ensure_ascii=False)
    header = f"{{%- set prompt = {texts} -%}}\n{{%- set image_marker = {json.dumps(marker)} -%}}\n"
    body = _read("content.jinja") + (_read("numbered.jinja") if family.numbers_images else "")
    body += _read("raw.jinja" if layout == "raw" else family.template)
    blank = "{{ ' ' if gen2embed_phrase else '' }}" if family.blank_before_answer else ""
    return header + caller_template(prompt, "prompt") + with_phrase(body, prompt, blank)


def carried_by_own(family: Family, template: object) -> bool:
    """Return whether the model's own chat template carries the prompt, rather than the family's.

    Args:
        family: The model's family.
        template: The template of the loaded model, with a prompt.

    Returns:
        Always true in a generic family, which has no other template.
    """
    return family.is_generic or (family.prefers_own_template and parts_of(template) is not None)


def check_layout(family: Family, layout: str) -> None:
    """Refuse an image layout that is unknown, or that a family does not have.

    Raises:
        Gen2EmbedError: The message names the known layouts, or the families that have this one.
    """
    if layout not in get_args(ImageLayout):
        raise Gen2EmbedError(f"unknown image layout {layout!r}; known: {', '.join(get_args(ImageLayout))}")
    if layout != "native" and family.is_generic:
        known = ", ".join(sorted(FAMILIES))
        raise Gen2EmbedError(
            f"layout={layout!r} is not for models of type {family.name!r}: it is that of the released checkpoints, of "
            f"types {known}; leave layout out"
        )


def check_num_crops(family: Family, processor_kwargs: Mapping[str, Any] | None) -> bool:
    """Refuse `num_crops` for a model whose images are not cut into tiles by that rule.

    Args:
        family: The model's family.
        processor_kwargs: What a user set for the processor.

    Returns:
        Whether the model has this setting, and the user did not set it.

    Raises:
        Gen2EmbedError: It is set for a model of another family.
    """
    is_set = (processor_kwargs or {}).get("num_crops") is not None
    has_it = family.model_type == PHI3_V.model_type
    if is_set and not has_it:
        raise Gen2EmbedError(
            f"num_crops is a setting of {PHI3_V.name}, and this model is of type {family.model_type!r}; leave it out"
        )
    return has_it and not is_set


@cache
def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
