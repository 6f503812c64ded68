"""LLaVA-NeXT with a Mistral language model: `[INST]` turns, 1-D positions, no video."""

from gen2embed_mteb.embedder.families.family import Family

LLAVA_NEXT = Family(
    name="LLaVA-NeXT",
    model_type="llava_next",
    template="llava_next.jinja",
    image="<image>",
    bare_image="<image>",
    mrope=False,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    has_video_processor=False,
    writes_special_tokens=False,
    blank_before_answer=True,
)
