"""What differs between the families of multimodal LLMs: the fields of one small record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageLayout = Literal["native", "official"]


@dataclass(frozen=True)
class Family:
    """A family of models that share a chat format.

    Attributes:
        name: How people call it.
        model_type: `model_type` in the model's `config.json`.
        template: File in `templates/` that renders a conversation.
        image: What the family's own processor writes for one image (`native` layout).
        bare_image: What VLM2Vec and the official Gen2Embed write (`official` layout): no vision start and end.
        mrope: Whether image tokens get 3-D positions; the official layout counts them 1-D instead.
        lora_targets: Names of the projections that the paper's adapters train (Sec. IV-A), as this family names them.
        has_video_processor: Whether the processor also wants a video processor, which needs torchvision.
        writes_special_tokens: Whether the template writes all special tokens itself. Only then can transformers take
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
