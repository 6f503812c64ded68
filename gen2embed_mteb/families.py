"""What differs between the families of multimodal LLMs: one small record each.

A new family is a record here and a template in `templates/`: the template is told the prompt's texts (`prompt`), the
side (`task`) and the conversation, and renders one user turn and the opened assistant turn (see `chat_template`).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.prompts import HierarchicalPrompt

ImageLayout = Literal["native", "official"]


@dataclass(frozen=True)
class Family:
    """A family of models that share a chat format.

    Attributes:
        name: how people call it.
        model_type: `model_type` in the model's `config.json`.
        template: file in `templates/` that renders a conversation.
        image: what the family's own processor writes for one image (`native` layout).
        bare_image: what VLM2Vec and the official Gen2Embed write (`official` layout): no vision start and end.
        mrope: whether image tokens get 3-D positions; the official layout counts them 1-D instead.
        lora_targets: names of the projections that the paper's adapters train (Sec. IV-A), as this family names them.
        has_video_processor: whether the processor also wants a video processor, which needs torchvision.
        writes_special_tokens: whether the template writes all special tokens itself. Only then can transformers take
            control tokens in the user's text as plain text; otherwise `Gen2Embed` breaks them up.
    """

    name: str
    model_type: str
    template: str
    image: str
    bare_image: str
    mrope: bool
    lora_targets: tuple[str, ...]
    has_video_processor: bool
    writes_special_tokens: bool

    @property
    def processing_kwargs(self) -> dict[str, dict[str, bool]]:
        """How sentence-transformers calls the processor: the assistant turn opened, the user's text kept harmless."""
        return {
            "chat_template": {
                "add_generation_prompt": True,
                "sanitize_control_tokens": self.writes_special_tokens,
            }
        }


_QWEN = {
    "template": "chatml.jinja",
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "bare_image": "<|image_pad|>",
    "mrope": True,
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    "has_video_processor": True,
    "writes_special_tokens": True,
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(name="Qwen2-VL", model_type="qwen2_vl", **_QWEN),  # type: ignore[arg-type]
        Family(name="Qwen2.5-VL", model_type="qwen2_5_vl", **_QWEN),  # type: ignore[arg-type]
        Family(name="Qwen3-VL", model_type="qwen3_vl", **_QWEN),  # type: ignore[arg-type]
        Family(
            name="LLaVA-NeXT",
            model_type="llava_next",
            template="llava_next.jinja",
            image="<image>",
            bare_image="<image>",
            mrope=False,
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
            has_video_processor=False,
            writes_special_tokens=False,
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a model.

    Args:
        model_type: `config.model_type` of the loaded model.

    Raises:
        ValueError: no family has that model type; the message lists the known ones and what a new one needs.
    """
    if model_type not in FAMILIES:
        known = ", ".join(f"{family.name} ({family.model_type})" for family in FAMILIES.values())
        raise Gen2EmbedError(
            f"unknown model family: model_type {model_type!r}. Known: {known}. A new family needs a native class in "
            "transformers, a Family record in gen2embed_mteb/families.py (image marker, LoRA targets, positions) and a "
            "chat template in gen2embed_mteb/templates/."
        )
    return FAMILIES[model_type]


def chat_template(family: Family, prompt: HierarchicalPrompt, layout: ImageLayout = "native") -> str:
    """The Jinja chat template that renders this prompt for this family.

    It needs nothing of this package: stock processors render it, with `task` ("query", "document" or undefined) and
    `add_generation_prompt` as variables. Its first line carries the prompt as JSON, which `prompt_of` reads back.

    Args:
        family: whose chat format.
        prompt: the texts.
        layout: `native`, the family's own image marker; `official`, the bare one.

    Raises:
        ValueError: unknown layout.
    """
    if layout not in ("native", "official"):
        raise Gen2EmbedError(f"unknown image layout {layout!r}; known: native, official")
    marker = family.image if layout == "native" else family.bare_image
    # JSON strings are Jinja strings as long as non-ASCII characters stay as they are.
    texts = json.dumps(asdict(prompt), ensure_ascii=False)
    header = f"{{%- set prompt = {texts} -%}}\n{{%- set image_marker = {json.dumps(marker)} -%}}\n"
    return header + _read("content.jinja") + _read(family.template)


def prompt_of(template: str) -> HierarchicalPrompt | None:
    """Read the prompt back from a template of `chat_template`; `None` if it is another's template."""
    first = re.match(r"\{%- set prompt = (\{.*\}) -%\}\n", template or "")
    return HierarchicalPrompt(**json.loads(first[1])) if first else None


@cache
def _read(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
