"""`Family`: a record of everything that differs between the families of multimodal LLMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageLayout = Literal["native", "official", "raw"]


@dataclass(frozen=True)
class Family:
    """A family of models that share a chat format.

    Attributes:
        name: The family's common name.
        model_type: `model_type` in the model's `config.json`.
        template: File in `templates/` that renders a conversation; empty for a generic family, whose models bring
            their own chat template.
        image: The marker that the family's own processor writes for one image (`native` layout); empty for a generic
            family.
        bare_image: The marker that VLM2Vec and the official Gen2Embed write (`official` layout), without the tokens
            for the start and end of an image; empty for a generic family.
        mrope: Whether image tokens get 3-D positions; the official layout gives them 1-D positions instead. `False`
            for a generic family, whose model class says it.
        lora_targets: Names of the projections that the paper's adapters train (Sec. IV-A), as this family names them.
        has_video_processor: Whether the processor requires a video processor, which needs torchvision.
        writes_special_tokens: Whether the template writes all special tokens itself. Only then can transformers read
            control tokens in the user's text as plain text; otherwise `Gen2Embed` puts a space inside them.
        blank_before_answer: Whether a blank stands between the user's turn and the answer.
        prefers_own_template: Whether, in the `native` layout, a model's own chat template carries the prompt if there
            is one that can (see `chat_formats`); `template` is then for all other cases. `False` for a generic
            family, which has no other template.
        numbers_images: Whether the marker of image k has the number k; `image` is then that of the first.
        own_classes: Names of classes of this package, which transformers does not have, that the model's files name.
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
    blank_before_answer: bool = False
    prefers_own_template: bool = False
    own_classes: tuple[str, ...] = ()
    numbers_images: bool = False

    @property
    def is_generic(self) -> bool:
        """Whether no template of ours exists, so that the model's own must carry the prompt (see `chat_formats`)."""
        return not self.template

    @property
    def tries_own_template(self) -> bool:
        """Whether the model's own chat template is tried, in the `native` layout."""
        return self.is_generic or self.prefers_own_template

    @property
    def processing_kwargs(self) -> dict[str, dict[str, bool]]:
        """The options with which sentence-transformers calls the processor.

        They begin the assistant turn, and let control tokens in the user's text count as plain text where possible.
        """
        return {
            "chat_template": {
                "add_generation_prompt": True,
                "sanitize_control_tokens": self.writes_special_tokens,
            }
        }
