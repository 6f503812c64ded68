"""Modelling code for another transformers: with the present one, or without flash-attn, importing it fails."""

import flash_attn  # noqa: F401
from transformers.models.llava_next.modeling_llava_next import LlavaClassOfLongAgo


class LlavaNextForConditionalGeneration(LlavaClassOfLongAgo):
    pass
