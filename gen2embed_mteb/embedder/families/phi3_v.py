"""Phi-3.5-V: `<|user|>` turns, numbered marks of images, a model and a processor of this package (see `phi3v/`)."""

from gen2embed_mteb.embedder.families.family import Family

PHI3_V = Family(
    name="Phi-3.5-V",
    model_type="phi3_v",
    template="phi3_v.jinja",
    image="<|image_1|>",
    bare_image="<|image_1|>",
    mrope=False,
    lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    has_video_processor=False,
    writes_special_tokens=False,
    numbers_images=True,
    own_classes=("Phi3VProcessor", "Phi3VImageProcessor"),
)
