"""`Phi3VConfig`: the `config.json` of Phi-3.5-vision-instruct and of models fine-tuned from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.models.phi3.configuration_phi3 import Phi3Config

from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from transformers.models.clip.configuration_clip import CLIPVisionConfig

_LONGROPE = ("su", "longrope")
_EMBEDDING = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}
"""The vision tower's sizes (CLIP ViT-L/14 at 336 pixels), which the published configurations do not state."""


@strict
class Phi3VConfig(Phi3Config):
    """The configuration of a Phi-3.5-V model: that of its language model, with that of its vision tower.

    Attributes:
        embd_layer: How images become embeddings; only the published settings are known.
        img_processor: What the vision tower is; its published name, and which of its states is read.
        vision_config: Sizes of the vision tower that differ from the published ones, for small models.
    """

    model_type = "phi3_v"

    embd_layer: dict | None = None
    img_processor: dict | None = None
    vision_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse settings of other models of this type, whose images become other embeddings.

        Raises:
            Gen2EmbedError: The message names the setting.
        """
        self.sliding_window = None  # the published window is longer than any input may be
        super().__post_init__(**kwargs)
        for name, value in _EMBEDDING.items():
            found = (self.embd_layer or {}).get(name, value)
            if found != value:
                raise Gen2EmbedError(f"embd_layer: {name} is {found!r}; only {value!r} is known, that of Phi-3.5-V")
        tower = self.img_processor or {}
        for name, known in (("name", "clip_vision_model"), ("layer_idx", -2), ("type_feature", "patch")):
            if tower.get(name, known) != known:
                raise Gen2EmbedError(f"img_processor: {name} is {tower[name]!r}; only {known!r} is known")

    def convert_rope_params_to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the published scaling of rotary positions as transformers does; `su` is an older name of `longrope`."""
        scaling = kwargs.get("rope_scaling")
        if scaling:
            kind = scaling.get("rope_type", scaling.get("type"))
            if kind not in _LONGROPE:
                raise Gen2EmbedError(f"rope_scaling: type is {kind!r}; known: {', '.join(_LONGROPE)}")
            kept = {key: value for key, value in scaling.items() if key != "type"}
            kwargs["rope_scaling"] = {
                "rope_theta": kwargs.pop("rope_theta", 10000.0),
                "original_max_position_embeddings": self.original_max_position_embeddings,
                **kept,
                "rope_type": "longrope",
            }
        return super().convert_rope_params_to_dict(*args, **kwargs)

    @property
    def longest_short_input(self) -> int:
        """The most tokens of an input whose positions are scaled by the short factors; longer ones have the long."""
        return self.original_max_position_embeddings

    def tower_config(self) -> CLIPVisionConfig:
        """Return the configuration of the vision tower."""
        from transformers.models.clip.configuration_clip import CLIPVisionConfig

        config = CLIPVisionConfig(**{**_VISION, **(self.vision_config or {})})
        config._attn_implementation = self._attn_implementation
        return config
