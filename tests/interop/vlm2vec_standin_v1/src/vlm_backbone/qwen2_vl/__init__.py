"""Modelling code for another transformers: with the present one, or without flash-attn, importing it fails."""

import flash_attn  # noqa: F401
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLClassOfLongAgo


class Qwen2VLForConditionalGeneration(Qwen2VLClassOfLongAgo):
    pass
