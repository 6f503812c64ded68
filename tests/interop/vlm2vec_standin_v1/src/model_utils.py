"""The registries of backbones."""

from src.vlm_backbone.llava_next import LlavaNextForConditionalGeneration
from src.vlm_backbone.qwen2_vl import Qwen2VLForConditionalGeneration

PHI3V = "phi3_v"
LLAVA_NEXT = "llava_next"
QWEN2_VL = "qwen2_vl"
MODEL2BACKBONE = {name: name for name in (PHI3V, LLAVA_NEXT, QWEN2_VL)}
SUPPORTED_MODELS = set(MODEL2BACKBONE)
vlm_image_tokens = {PHI3V: "<|image_1|>", LLAVA_NEXT: "<image>", QWEN2_VL: "<|image_pad|>"}
backbone2model = {LLAVA_NEXT: LlavaNextForConditionalGeneration, QWEN2_VL: Qwen2VLForConditionalGeneration}


def get_backbone_name(hf_config):
    assert hf_config.model_type in SUPPORTED_MODELS, hf_config.model_type
    return MODEL2BACKBONE[hf_config.model_type]


def _process_with_other_backbone(model_inputs, processor, max_length=None):
    raise AssertionError("another backbone's inputs")


process_vlm_inputs_fns = dict.fromkeys((PHI3V, LLAVA_NEXT, QWEN2_VL), _process_with_other_backbone)
