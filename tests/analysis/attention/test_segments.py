"""Segments found in the ids alone, in families whose templates and image tokens differ."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from gen2embed_mteb.analysis.attention.segments import by_position, by_words, image_mask, places, token_ids
from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.embedder.prompts.strategies import SYSTEM
from gen2embed_mteb.errors import Gen2EmbedError

FAMILIES = ("qwen2_vl", "llava_next", "phi3_v", "idefics3", "gemma3")
TEXT = " What is this?"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


@pytest.fixture(params=FAMILIES)
def model(request: Any, tiny: Any) -> Any:
    return tiny(request.param)


def test_the_words_are_found_in_each_place_and_the_segments_cover_every_token(model: Any) -> None:
    content = Content(TEXT, (picture(),))
    for placed in places(content, SYSTEM):
        ids = np.array(token_ids(model, placed.content, "query"))
        words, segments = by_words(model, placed, ids, "query"), by_position(model, placed.content, ids, "query")
        assert model.tokenizer.decode(ids[words["words"]]).strip() == SYSTEM
        for found in (words, segments):
            np.testing.assert_array_equal(sum(mask.astype(int) for mask in found.values()), 1)
        np.testing.assert_array_equal(words["image"], segments["image"])
        image = np.flatnonzero(segments["image"])
        assert (np.diff(image) == 1).all()  # one picture is one run, marks of rows and tiles included
        assert np.flatnonzero(segments["system"])[-1] + 1 == np.flatnonzero(~segments["system"])[0]
        assert segments["user"][-1]


def test_the_papers_system_segment_holds_the_header_of_the_users_turn(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    content = Content(TEXT, (picture(),))
    ids = token_ids(model, content, "query")
    segments = by_position(model, content, ids, "query")
    head = model.tokenizer.decode(np.array(ids)[segments["system"]])
    assert head == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    pad = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    np.testing.assert_array_equal(segments["image"], np.array(ids) == pad)
    tail = model.tokenizer.decode(np.array(ids)[segments["user"]])
    assert tail.startswith(f"<|vision_end|>{TEXT}") and tail.endswith("<|im_start|>assistant\n")


def test_without_an_image_the_users_text_begins_the_users_segment(model: Any) -> None:
    content = Content("car, red")
    ids = np.array(token_ids(model, content, "query"))
    segments = by_position(model, content, ids, "query")
    assert list(segments) == ["system", "user"]
    assert model.tokenizer.decode(ids[segments["user"]]).strip().startswith("car, red")


def test_a_text_before_a_marked_image_begins_the_users_segment(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    content = Content("Look: <|image_1|> What is this?", (picture(),))
    ids = np.array(token_ids(model, content, "query"))
    segments = by_position(model, content, ids, "query")
    assert model.tokenizer.decode(ids[segments["user"]]).startswith("Look:")


def test_the_same_words_move_from_role_to_role_and_from_front_to_back(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    firsts = []
    for placed in places(Content(TEXT, (picture(),)), SYSTEM):
        rendered = model.render(placed.content, "query")
        assert rendered.count(SYSTEM) == 1
        assert ("<|im_start|>system" in rendered) == (placed.name == "system turn")
        ids = token_ids(model, placed.content, "query")
        firsts.append(int(np.flatnonzero(by_words(model, placed, ids, "query")["words"])[0]))
    assert firsts[0] < 8 and firsts[1] < 8 < firsts[2]


def test_an_image_whose_tokens_are_unknown_is_an_error(tiny: Any) -> None:
    with pytest.raises(Gen2EmbedError, match="no token is known to be an image's"):
        image_mask(tiny("qwen2_vl"), [1, 2, 3], 1)
    with pytest.raises(Gen2EmbedError, match="neither an image nor a text"):
        by_position(tiny("qwen2_vl"), Content(""), token_ids(tiny("qwen2_vl"), Content(""), "query"), "query")
