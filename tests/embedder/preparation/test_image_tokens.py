"""Tokens of images by size, against what the processors of tiny models write; numbers counted by hand where small."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from tiny_any import TEXT_ONLY
from tiny_models import FAMILIES
from tiny_torchvision import LOADABLE

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.preparation.image_tokens import ImageTokens, Renderer
from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError

MULTIMODAL = [family for family in LOADABLE if family not in TEXT_ONLY]
SIZES = [(64, 64), (28, 28), (300, 100), (56, 112)]


def renderer(model: Gen2Embed) -> Renderer:
    return Renderer(model[0], model[0].processing_kwargs["chat_template"], "query")


def written(model: Gen2Embed, sizes: list[tuple[int, int]]) -> int:
    """How many tokens the processor writes for images of these sizes, beyond one placeholder each."""
    content = Content("", tuple(Image.new("RGB", size, "teal") for size in sizes))
    return len(renderer(model).real(content)) - len(renderer(model).rendered(content))


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_totals_are_what_the_processor_writes(tiny: Any, family: str) -> None:
    model = tiny(family)
    tokens = ImageTokens(renderer(model))
    for sizes in [*([size] for size in SIZES), SIZES[:2], SIZES[:3], [SIZES[0]] * 2]:
        assert tokens.total(sizes) - len(sizes) + tokens.added == written(model, sizes)
    rows = [[size] for size in SIZES] + [SIZES[:2], []]
    assert ImageTokens(renderer(model)).totals(rows) == [tokens.total(row) for row in rows]


@pytest.mark.parametrize(
    ("family", "alone", "together"),
    [
        # 64x64 at 14 pixels a patch, 2x2 patches a token: 2x2 of them. Two images: twice that.
        ("qwen2_vl", 4, 8),
        ("llava", 16, 32),  # 56x56 at 14 pixels a patch
        # 4 and the marks around them, two lines before (one token) and behind (two, as a word follows); between two
        # images both pairs of lines are one token each.
        ("gemma3", 9, 17),
        ("internvl", 6, 12),  # 4 of one tile, and the marks around them
        ("ovis2", 26, 52),  # 5 tiles of 4, three marks, two ends of a column, one of a row
        # Alone 4x4 of the whole, 8x8 of the tiles of 112x112, 8 ends of lines; together 4x4 and 1 each.
        ("llava_onevision", 88, 34),
    ],
)
def test_numbers_by_hand(tiny: Any, family: str, alone: int, together: int) -> None:
    tokens = ImageTokens(renderer(tiny(family)))
    assert (tokens.total([(64, 64)]), tokens.total([(64, 64)] * 2)) == (alone, together)


def test_tokens_beside_an_image_that_merge_with_the_text_are_noticed(tiny: Any) -> None:
    """Gemma 3 writes lines around an image. Only an input with all its text can be counted then."""
    assert not ImageTokens(renderer(tiny("gemma3"))).exact
    assert all(ImageTokens(renderer(tiny(family))).exact for family in [*FAMILIES, *MULTIMODAL] if family != "gemma3")


def test_what_was_measured_holds_until_the_settings_change(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen3_5"), device="cpu")
    assert ImageTokens(renderer(model)).total([(320, 320)]) == 25  # at most 28 * 28 * 36 pixels: 160x160, 32 a token
    model.processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    assert ImageTokens(renderer(model)).total([(320, 320)]) == 4


def test_sizes_that_a_processor_refuses(tiny: Any) -> None:
    tokens = ImageTokens(renderer(tiny("qwen2_vl")))
    with pytest.raises(Gen2EmbedError, match=r"refuses images of 3000x10 pixels .*min_side=28 enlarges them"):
        tokens.total([(3000, 10)])
    assert tokens.totals([[(3000, 10)], [(64, 64)], [(64, 64), (3000, 10)]]) == [0, 4, 4]


def test_a_model_of_text_alone_has_no_images(tiny: Any) -> None:
    model = tiny("llama")
    tokens = ImageTokens(renderer(model))
    assert tokens.total([]) == 0
    with pytest.raises(Gen2EmbedError, match="reads text alone: leave the images out"):
        tokens.total([(64, 64)])
    assert model.count_tokens(["a"], [[(64, 64)]]) == model.count_tokens(["a"], [[]])


def test_two_images_in_one_input_may_be_impossible(tiny_dir: Any) -> None:
    """A template that writes one placeholder, whatever is given: the processor finds one too few."""
    model = Gen2Embed(tiny_dir("qwen3_5"), device="cpu")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    model.processor.chat_template = (
        "{%- for part in messages[-1].content if part.type == 'image' -%}"
        "{%- if loop.first -%}{{ '" + image + "' }}{%- endif -%}{%- endfor -%}{{ 'a' }}"
    )
    tokens = ImageTokens(renderer(model))
    assert tokens.total([(64, 64)]) == 4
    with pytest.raises(Gen2EmbedError, match=r"Qwen3VLProcessor cannot take 2 images .*pass one image per input"):
        tokens.total([(64, 64)] * 2)
    assert tokens.totals([[(64, 64)], [(64, 64)] * 2]) == [4, 8]
