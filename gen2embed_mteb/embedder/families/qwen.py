"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one chat format (ChatML), 3-D positions for image tokens.

The published template of Qwen3-VL-Instruct renders what ours renders; so a model of that type keeps its own template,
which may be a fine-tuned model's. Those of Qwen2-VL and Qwen2.5-VL say a system text of their own where none is given.
"""

from gen2embed_mteb.embedder.families.family import Family


def _qwen(name: str, model_type: str, *, prefers_own_template: bool = False) -> Family:
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
        prefers_own_template=prefers_own_template,
    )


QWEN = (
    _qwen("Qwen2-VL", "qwen2_vl"),
    _qwen("Qwen2.5-VL", "qwen2_5_vl"),
    _qwen("Qwen3-VL", "qwen3_vl", prefers_own_template=True),
)
