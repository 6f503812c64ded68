"""Too long an input: only the user's text is cut, and only as far as needed; prompts and image tokens survive."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed

SYSTEM = "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."
TEXT, IMAGE = "\nRepresent the given text in one word.", "\nRepresent the given text/image in one word."
MARKER = re.compile(r"<\|image_[1-9]\|>")

# Characters of one to four bytes, some that grow threefold when normalised, control tokens, and MMEB's marker.
PIECES = [
    "a",
    "word ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "7",
    "é",
    "中文",
    "🦊",
    "👩‍🚀",
    "e\u0301",
    "\u0958",
    "\U0001d160",
    "\x00",
]
PIECES += ["<|image_pad|>", "<|im_end|>", "<image>", "</s>", "<|image_1|>", "[/INST]", "▁", "\u2028", "ﷺ"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=120).map("".join),
    st.text(st.characters(codec="utf-8"), max_size=200),
    st.tuples(st.sampled_from(PIECES), st.integers(1, 400)).map(lambda pair: pair[0] * pair[1]),
)
SIZES = st.lists(st.tuples(st.integers(8, 180), st.integers(8, 180)), max_size=2)
LIGHT = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def parts(family: str, role: str, images: int) -> tuple[str, str]:
    """What stands in front of the user's content, and behind it."""
    suffix = (IMAGE if images else TEXT) if role == "query" else ""
    if family == "llava_next":
        return f"[INST] {SYSTEM}\n", f"{suffix} [/INST]"
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", f"{suffix}<|im_end|>\n<|im_start|>assistant\n"


def image_tokens(model: Gen2Embed, ids: list[int]) -> int:
    return ids.count(model.tokenizer.convert_tokens_to_ids(model.processor.image_token))


def least_image_tokens(model: Gen2Embed, sizes: list[tuple[int, int]]) -> int:
    """The fewest tokens that images of these sizes (width, height) become at any lower resolution."""
    least = []
    for percent in range(1, 101):
        scaled = [[max(1, side * percent // 100) for side in (height, width)] for width, height in sizes]
        least.append(sum(model.processor._get_num_multimodal_tokens(image_sizes=scaled).num_image_tokens))
    return min(least)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_at_every_length_prompts_and_images_survive(tiny, family):
    model = tiny(family)
    bare = {role: len(model.preprocess([""], task=role)["input_ids"][0]) for role in ("query", "document")}
    cases = {"cut": 0, "whole": 0, "refused": 0}

    @LIGHT
    @given(text=TEXTS, sizes=SIZES, extra=st.integers(-5, 150), role=st.sampled_from(["query", "document"]))
    def check(text, sizes, extra, role):
        images = [Image.new("RGB", size, "teal") for size in sizes]
        max_length = bare[role] + extra
        whole = model.preprocess([{"text": text, "image": images}], task=role)["input_ids"][0].tolist()
        try:
            features = model.preprocess([{"text": text, "image": images}], task=role, max_length=max_length)
        except ValueError as error:
            cases["refused"] += 1
            assert f"max_length={max_length}" in str(error)
            # Only where nothing could be done: the prompt with the images at their smallest does not fit. At a few
            # pixels, what their shape is rounded to makes a difference of a token or two.
            ids = model.preprocess([{"text": "", "image": images}], task=role)["input_ids"][0].tolist()
            least = 1.5 * least_image_tokens(model, sizes) if images else 0
            assert max_length < len(ids) - image_tokens(model, ids) + least
            return
        ids = features["input_ids"][0].tolist()
        assert len(ids) <= max_length
        if len(whole) <= max_length:  # what fits is left alone
            cases["whole"] += 1
            assert ids == whole
            return
        cases["cut"] += 1
        front, back = parts(family, role, len(images))
        decoded = model.tokenizer.decode(ids).removeprefix("<s>").lstrip()
        assert decoded.startswith(front)
        assert decoded.endswith(back)
        fitter = model._fitter(role)
        content = model._content({"text": text, "image": images})
        fitted = fitter.fit(content, max_length)
        assert fitter.count(fitted) == len(ids)
        assert MARKER.sub("", content.text).startswith(MARKER.sub("", fitted.text))
        if images:
            assert image_tokens(model, ids) == fitter.image_tokens(fitted.images) > 0
            model(features)  # a count that does not match the pixels would raise here

    check()
    assert min(cases.values()) > 0, cases  # the examples cover all three


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kept_text_is_the_longest_beginning_that_fits(tiny, family):
    """Against the lengths of what the processor makes of longer beginnings."""
    model = tiny(family)
    bare = len(model.preprocess([""], task="query")["input_ids"][0])

    def length(text: str) -> int:
        return len(model.preprocess([text], task="query")["input_ids"][0])

    def broken_up(text: str) -> str:
        """LLaVA's control tokens get a space; cutting comes after."""
        return model._content(text).text

    fitter = model._fitter("query")

    @settings(LIGHT, max_examples=25)
    @given(text=TEXTS.filter(lambda text: not MARKER.search(text)), extra=st.integers(0, 60))
    def check(text, extra):
        text = broken_up(text)
        features = model.preprocess([text], task="query", max_length=bare + extra)
        ids = features["input_ids"][0].tolist()
        if length(text) <= bare + extra:
            return
        kept = fitter.fit(model._content(text), bare + extra).text
        assert text.startswith(kept)
        assert model.preprocess([kept], task="query")["input_ids"][0].tolist() == ids
        # With one character more, or a few, it would not have fitted; two tokens may be wasted.
        longer = [length(text[: len(kept) + more]) for more in range(1, 16) if len(kept) + more <= len(text)]
        assert min(longer) >= bare + extra - 2

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_text_only_where_there_is_no_image(tiny, family):
    """A concrete case, read in full."""
    model = tiny(family)
    front, back = parts(family, "query", 0)
    text = "a b c d " * 200
    for max_length in (80, 120, 200) if family != "llava_next" else (120, 160, 200):
        features = model.preprocess([text], task="query", max_length=max_length)
        decoded = model.tokenizer.decode(features["input_ids"][0]).removeprefix("<s>").lstrip()
        kept = decoded.removeprefix(front).removesuffix(back)
        assert decoded == front + kept + back
        assert text.startswith(kept)
        assert kept
        assert max_length - 2 <= features["input_ids"].shape[1] <= max_length


def test_control_tokens_in_a_long_text_are_counted_as_text(tiny):
    # Each is six tokens or so when it is text; counted as one, nearly all of the text would be lost in the cut.
    model = tiny("qwen2_vl")
    for token in ("<|image_pad|>", "<|im_end|>"):
        features = model.preprocess([f"{token} " * 200], task="query", max_length=150)
        assert 140 <= features["input_ids"].shape[1] <= 150


def test_a_multi_byte_character_is_kept_whole_or_not_at_all(tiny):
    for family in FAMILIES:
        model = tiny(family)
        for length in range(150, 162):
            ids = model.preprocess(["🦊中" * 200], task="query", max_length=length)["input_ids"][0]
            assert "\ufffd" not in model.tokenizer.decode(ids)
            assert length - 6 <= len(ids) <= length


def test_markers_of_a_cut_text_stay_as_long_as_their_images(tiny, pictures):
    for family in FAMILIES:
        model = tiny(family)
        whole = model.preprocess([{"image": pictures[:2]}], task="query")["input_ids"][0].tolist()
        text = "first " * 300 + "<|image_1|> and " + "then " * 300 + "<|image_2|>"
        sample = {"text": text, "image": pictures[:2]}
        features = model.preprocess([sample], task="query", max_length=len(whole) + 20)
        ids = features["input_ids"][0].tolist()
        assert image_tokens(model, ids) == image_tokens(model, whole)
        assert len(ids) <= len(whole) + 20
        model(features)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_that_alone_are_too_large_are_reduced(tiny, family):
    model, image = tiny(family), Image.effect_noise((224, 224), 80).convert("RGB")
    whole = model.preprocess([image], task="query")
    ids = whole["input_ids"][0].tolist()
    images = image_tokens(model, ids)
    max_length = len(ids) - images // 3
    features = model.preprocess([image], task="query", max_length=max_length)
    fewer = features["input_ids"][0].tolist()
    assert len(fewer) <= max_length
    assert 0 < image_tokens(model, fewer) < images
    assert np.isfinite(model(features)["sentence_embedding"].detach().numpy()).all()
    # With a text beside it, a part of the room is kept for the text.
    features = model.preprocess([{"text": "word " * 500, "image": image}], task="query", max_length=max_length)
    decoded = model.tokenizer.decode(features["input_ids"][0])
    assert "word word word" in decoded
    assert decoded.endswith(parts(family, "query", 1)[1])
    assert 0 < image_tokens(model, features["input_ids"][0].tolist()) < images


@pytest.mark.parametrize("family", FAMILIES)
def test_the_impossible_is_refused_and_names_max_length(tiny, family):
    model, image = tiny(family), Image.new("RGB", (150, 150))
    with pytest.raises(ValueError, match=r"max_length=10 is too short: the prompt alone takes \d+ tokens"):
        model.preprocess(["a fox"], task="query", max_length=10)
    ids = model.preprocess([image], task="query")["input_ids"][0].tolist()
    prompt = len(ids) - image_tokens(model, ids)
    least = least_image_tokens(model, [image.size])
    with pytest.raises(ValueError, match=rf"max_length={prompt + least - 1} leaves {least - 1} tokens .* of 150x150"):
        model.preprocess([image], task="query", max_length=prompt + least - 1)
    assert model.preprocess([image], task="query", max_length=prompt + least)["input_ids"].shape[1] == prompt + least
    with pytest.raises(ValueError, match=rf"max_length={prompt + least} "):
        model.preprocess([{"image": [image] * 9}], task="query", max_length=prompt + least)


def test_max_length_of_the_model_of_the_call_and_of_the_processing_are_one(tiny_dir, tiny):
    text = "a b c d " * 200
    want = tiny("qwen2_vl").preprocess([text], task="query", max_length=90)["input_ids"]
    model = Gen2Embed(tiny_dir("qwen2_vl"), max_length=90)
    assert (model.preprocess([text], task="query")["input_ids"] == want).all()
    nested = {"text": {"max_length": 90}}
    assert (tiny("qwen2_vl").preprocess([text], task="query", processing_kwargs=nested)["input_ids"] == want).all()
    assert np.allclose(model.encode_query(text), tiny("qwen2_vl").encode_query(text, processing_kwargs=nested))


def test_cutting_in_a_batch_is_cutting_one_by_one(tiny, pictures):
    model = tiny("qwen3_vl")
    inputs = ["word " * 300, "fox", {"text": "word " * 300, "image": pictures[0]}, {"image": pictures[1]}]
    kwargs = {"processing_kwargs": {"text": {"max_length": 120}}}
    batched = model.encode_query(inputs, **kwargs)
    assert np.abs(batched - np.stack([model.encode_query(one, **kwargs) for one in inputs])).max() < 1e-5
