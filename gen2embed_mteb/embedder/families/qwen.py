"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one chat format (ChatML), 3-D positions for image tokens."""

from gen2embed_mteb.embedder.families.family import Family


def _qwen(name: str, model_type: str) -> Family:
    return Family(
        name=name,
        model_type=model_type,
        template="chatml.jinja",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        bare_image="<|image_pad|>",
        mrope=True,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
        has_video_processor=True,
        writes_special_tokens=True,
    )


QWEN = (_qwen("Qwen2-VL", "qwen2_vl"), _qwen("Qwen2.5-VL", "qwen2_5_vl"), _qwen("Qwen3-VL", "qwen3_vl"))
