"""The registries of backbones, and how a text is put together."""

from transformers import AutoProcessor

from src.model.baseline_backbone.colpali import ColPali  # noqa: F401
from src.model.vlm_backbone.qwen2_vl import Qwen2VLForConditionalGeneration

PHI3V = "phi3_v"
QWEN2_VL = "qwen2_vl"
MODEL2BACKBONE = {PHI3V: PHI3V, QWEN2_VL: QWEN2_VL}
SUPPORTED_MODELS = set(MODEL2BACKBONE)
VLM_IMAGE_TOKENS = {PHI3V: "<|image_1|>", QWEN2_VL: "<|image_pad|>"}
VLM_VIDEO_TOKENS = {QWEN2_VL: "<|video_pad|>"}
backbone2model = {QWEN2_VL: Qwen2VLForConditionalGeneration}


def load_processor(model_args, data_args=None):
    if model_args.model_backbone in backbone2model:
        raise AssertionError("another backbone's processor")
    return AutoProcessor.from_pretrained(model_args.processor_name or model_args.model_name, trust_remote_code=True)


def get_backbone_name(hf_config, model_type=None):
    return MODEL2BACKBONE[model_type or hf_config.model_type]


def process_input_text(instruction, model_backbone, text=None, add_video_token=False, add_image_token=False):
    parts = [VLM_VIDEO_TOKENS[model_backbone]] if add_video_token else []
    parts += [VLM_IMAGE_TOKENS[model_backbone]] if add_image_token else []
    parts += [instruction, text] if text else [instruction]
    return " ".join(parts)


def _process_with_other_backbone(model_inputs, processor, max_length=None):
    raise AssertionError("another backbone's inputs")


process_vlm_inputs_fns = dict.fromkeys((PHI3V, QWEN2_VL), _process_with_other_backbone)
