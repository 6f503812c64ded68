"""`Phi3VModel`: the language model of transformers' Phi-3, its CLIP vision tower, and what joins the two.

Of an image, the processor makes crops of 336x336 pixels: a global view, and tiles. Per crop, the tower gives 24x24
states; 2x2 neighbours become one of 4096 channels. The tiles' grids are joined to one, a separator ends each of its
rows, and the global view follows behind another separator. A projector makes embeddings of all of them.

The last layer of the tower is loaded but not run: the states before it are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3Model
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from gen2embed_mteb.embedder.families.phi3v.configuration import Phi3VConfig
from gen2embed_mteb.embedder.families.phi3v.image_processing import GRID, SIDE
from gen2embed_mteb.errors import Gen2EmbedError

IMAGE_TOKEN_ID = 32044
"""The id of `<|image|>`, which stands in `input_ids` where an embedding of an image goes."""
_MERGE = 2


class RotaryEmbedding(nn.Module):
    """LongRoPE with factors per row: a row that is longer than the short factors allow has the long ones.

    In the published code and in transformers, the longest row of a batch decides for all of them, so that a vector
    depends on the other rows.
    """

    def __init__(self, config: Phi3VConfig) -> None:
        """Compute both sets of inverse frequencies."""
        super().__init__()
        self.limit = config.longest_short_input
        self.config = config
        short, self.attention_scaling = self._frequencies(None)
        self.short_inv_freq = nn.Buffer(short, persistent=False)
        self.long_inv_freq = nn.Buffer(self._frequencies(self.limit + 1)[0], persistent=False)

    def _frequencies(self, length: int | None, device: Any = None) -> tuple[torch.Tensor, float]:
        return ROPE_INIT_FUNCTIONS["longrope"](self.config, device, seq_len=length)

    def reset(self) -> None:
        """Compute the frequencies again, after the module was made without memory."""
        device = self.short_inv_freq.device
        self.short_inv_freq.copy_(self._frequencies(None, device)[0])
        self.long_inv_freq.copy_(self._frequencies(self.limit + 1, device)[0])

    @torch.no_grad()
    def forward(
        self, states: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, each (n, length, head size) in the type of the states.

        Args:
            states: Only their type and device are used.
            position_ids: (n, length) or (1, length) int64.
            lengths: (n,) int64, the tokens of each row, with those before `position_ids`.
        """
        is_long = (lengths > self.limit)[:, None, None]
        frequencies = torch.where(is_long, self.long_inv_freq.float(), self.short_inv_freq.float())
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(states.dtype), sin.to(states.dtype)


class VisionTower(nn.Module):
    """CLIP's vision tower, up to the last layer but one."""

    def __init__(self, config: Phi3VConfig) -> None:
        """Make the tower."""
        super().__init__()
        self.vision_model = CLIPVisionModel(config.tower_config())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the states of patches, (n, 576, d), for crops (n, 3, 336, 336)."""
        tower = self.vision_model
        states = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for layer in tower.encoder.layers[:-1]:
            states = layer(states, attention_mask=None)
        return states[:, 1:]


class ImageEmbedding(nn.Module):
    """From crops to the embeddings of images, in the order of tokens."""

    def __init__(self, config: Phi3VConfig) -> None:
        """Make tower, separators and projector."""
        super().__init__()
        width = _MERGE**2 * config.tower_config().hidden_size
        self.img_processor = VisionTower(config)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.img_projection = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of all images one behind the other, (tokens, hidden size).

        Args:
            pixel_values: (n, most crops, 3, 336, 336): the global view, the tiles, zeros.
            image_sizes: (n, 2) int64, height and width in pixels of the tiles together.
        """
        grids = [(int(height) // SIDE, int(width) // SIDE) for height, width in image_sizes.tolist()]
        dtype = self.glb_GN.dtype
        crops = torch.cat(
            [crops[: rows * columns + 1] for crops, (rows, columns) in zip(pixel_values, grids, strict=True)]
        )
        merged = _merged(self.img_processor(crops.to(dtype)))
        joined, start = [], 0
        for rows, columns in grids:
            own = merged[start : start + rows * columns + 1]
            start += len(own)
            tiles = own[1:].reshape(rows, columns, GRID, GRID, -1).transpose(1, 2)
            tiles = tiles.reshape(rows * GRID, columns * GRID, -1)
            joined += [self._with_ends(tiles), self.glb_GN[0], self._with_ends(own[0])]
        embeddings: torch.Tensor = self.img_projection(torch.cat(joined))
        return embeddings

    def _with_ends(self, grid: torch.Tensor) -> torch.Tensor:
        """Return the states of a grid (rows, columns, d) row by row, each with the separator behind it."""
        ends = self.sub_GN[0].expand(len(grid), 1, -1)
        return torch.cat((grid, ends), dim=1).flatten(0, 1)


def _merged(states: torch.Tensor) -> torch.Tensor:
    """Return (n, 12, 12, 4d) for (n, 576, d): the channels are row in the block, column in the block, channel."""
    size = len(states), GRID, _MERGE, GRID, _MERGE, states.shape[-1]
    return states.reshape(size).permute(0, 1, 3, 2, 4, 5).flatten(3)


class Phi3VPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model to load, save and run it."""

    config_class = Phi3VConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Phi3DecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012 (as in transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"vision_embed_tokens\.wte\.weight$"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Phi3DecoderLayer}  # noqa: RUF012
    input_modalities = ("image", "text")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            module.reset()


class Phi3VLanguageModel(Phi3Model):
    """Phi-3 of transformers, with positions that depend on a row alone."""

    config_class = Phi3VConfig

    def __init__(self, config: Phi3VConfig) -> None:
        """Make the layers."""
        super().__init__(config)
        self.rotary_emb = RotaryEmbedding(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            module.reset()
        else:
            super()._init_weights(module)

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # noqa: PLR0917 (as in transformers)
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the states of all tokens behind the final norm, (n, length, hidden size).

        Args:
            input_ids: (n, length) int64.
            attention_mask: (n, tokens before + length), 1 where there is a token; `None`: everywhere.
            position_ids: (n, length) or (1, length) int64; `None` counts from the tokens before.
            past_key_values: What the layers kept of the tokens before.
            inputs_embeds: (n, length, hidden size), instead of `input_ids`.
            use_cache: Whether to return what the layers keep.
            kwargs: Options of attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise Gen2EmbedError("give either input_ids or inputs_embeds")
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = before + torch.arange(states.shape[1], device=states.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if attention_mask is None or attention_mask.dim() != 2:
            lengths = torch.full((len(states),), before + states.shape[1], device=states.device)
        else:
            lengths = attention_mask.sum(dim=1)
        position_embeddings = self.rotary_emb(states, position_ids, lengths)
        for layer in self.layers[: self.config.num_hidden_layers]:
            states = layer(
                states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(states), past_key_values=past_key_values if use_cache else None
        )


class Phi3VModel(Phi3VPreTrainedModel):
    """Phi-3.5-V without an output layer."""

    def __init__(self, config: Phi3VConfig) -> None:
        """Make the language model and the embedding of images."""
        super().__init__(config)
        self.language_model = Phi3VLanguageModel(config)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        embedding: nn.Module = self.language_model.embed_tokens
        return embedding

    def get_decoder(self) -> nn.Module:
        """Return the language model."""
        return self.language_model

    @can_return_tuple
    def forward(  # noqa: PLR0917 (as in transformers)
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the states of all tokens behind the final norm, (n, length, hidden size).

        Args:
            input_ids: (n, length) int64, with the image token where an image's embeddings go.
            attention_mask: See `Phi3VLanguageModel`.
            position_ids: See `Phi3VLanguageModel`.
            past_key_values: See `Phi3VLanguageModel`.
            inputs_embeds: (n, length, hidden size), instead of `input_ids`; then without images.
            pixel_values: (images, most crops, 3, 336, 336), in the order of their marks.
            image_sizes: (images, 2) int64, height and width in pixels of the tiles together.
            kwargs: `use_cache`, and options of attention.

        Raises:
            Gen2EmbedError: The images have more or fewer embeddings than there are image tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values, image_sizes)
        output: BaseModelOutputWithPast = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return output

    def get_image_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return the embeddings of images one behind the other in `pooler_output`, (tokens, hidden size)."""
        return BaseModelOutputWithPooling(pooler_output=self.vision_embed_tokens(pixel_values, image_sizes))

    def _with_images(
        self,
        input_ids: torch.Tensor | None,
        states: torch.Tensor,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None,
    ) -> torch.Tensor:
        if input_ids is None or image_sizes is None:
            raise Gen2EmbedError("pixel_values need input_ids and image_sizes")
        features = self.get_image_features(pixel_values=pixel_values, image_sizes=image_sizes).pooler_output
        places = input_ids == IMAGE_TOKEN_ID
        if int(places.sum()) != len(features):
            raise Gen2EmbedError(
                f"{int(places.sum())} image tokens, but the images have {len(features)} embeddings; prepare text and "
                "images together, with Phi3VProcessor"
            )
        return states.masked_scatter(places[..., None].expand_as(states), features.to(states.dtype))


NAMES = [
    WeightRenaming(source_patterns=r"^model\.(embed_tokens|layers|norm)\.", target_patterns=r"language_model.\1."),
    WeightRenaming(source_patterns=r"^model\.vision_embed_tokens\.", target_patterns="vision_embed_tokens."),
]
"""From the names in the published files to ours."""
