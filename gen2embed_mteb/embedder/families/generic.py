"""The record of a model type for which no family was written by hand: its own chat template carries the prompt."""

from gen2embed_mteb.embedder.families.family import Family

LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    *("qkv_proj", "in_proj_qkv", "out_proj", "w2"),
)
"""Names of the projections that an adapter trains, in the decoders of transformers; a decoder has some of them."""


def generic_family(model_type: str) -> Family:
    """Return the record of any model type: no template and no marker of ours, which the model's own template writes.

    Args:
        model_type: `config.model_type` of the model.
    """
    return Family(
        name=model_type,
        model_type=model_type,
        template="",
        image="",
        bare_image="",
        mrope=False,
        lora_targets=LORA_TARGETS,
        has_video_processor=False,
        writes_special_tokens=True,
    )
