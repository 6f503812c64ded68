"""Runs of image tokens: encoded at once in worker processes, to the numbers that the tokenizer itself gives."""

import copy

import pytest
from samples import FAMILIES, sample_of
from tiny_any import ANY
from tokenizers import AddedToken

from gen2embed_mteb.embedder.preparation.token_runs import repeat_image_tokens

ALL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "phi3_v", *ANY)
PLAIN = {"add_special_tokens": False}


@pytest.fixture
def quick(tiny):
    """`quick(family)`: a processor of our own that encodes runs at once, and the image token."""

    def processor_of(family):
        own = copy.deepcopy(tiny(family).processor)
        repeat_image_tokens(own)
        return own, getattr(own, "image_token", "<none>")

    return processor_of


def texts(token):
    return [
        token * 7,
        f"a{token * 3}b",
        f"Is it? {token * 2} \n{token} {token * 5}x",
        f"{token * 4}{token[:-1]}{token * 2}",
        f"\n\n{token * 2}\n  word{token * 2}",
        f"{token}{token[1:]}",
        "no picture",
        "",
    ]


@pytest.mark.parametrize("family", sample_of(ALL, FAMILIES))
def test_runs_become_what_the_tokenizer_makes_of_them(tiny, quick, family):
    tokenizer = tiny(family).tokenizer
    processor, token = quick(family)
    own = getattr(processor, "tokenizer", processor)
    for text in texts(token):
        assert own.encode(text, **PLAIN) == tokenizer.encode(text, **PLAIN), text
        assert own.encode(text) == tokenizer.encode(text), text


def test_one_of_a_run_is_read(quick, monkeypatch):
    processor, token = quick("qwen2_vl")
    read = []
    encode = type(processor.tokenizer).encode

    def noted(self, text, **kwargs):
        read.append(text)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(type(processor.tokenizer), "encode", noted)
    number = processor.tokenizer.convert_tokens_to_ids(token)
    assert processor.tokenizer.encode(f"a{token * 900}b", **PLAIN)[1:-1] == [number] * 900
    assert read == [f"a{token}b"]


def test_a_token_that_is_to_be_read_as_text_is_not_repeated(tiny, quick):
    processor, token = quick("qwen2_vl")
    other = copy.deepcopy(tiny("qwen2_vl").tokenizer)
    for one in (processor.tokenizer, other):
        one.split_special_tokens = True
    found = processor.tokenizer.encode(token * 3, **PLAIN)
    assert found == other.encode(token * 3, **PLAIN)
    assert processor.tokenizer.convert_tokens_to_ids(token) not in found


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_a_token_that_looks_at_what_is_around_it_is_left_to_the_tokenizer(tiny, flag):
    processor = copy.deepcopy(tiny("qwen2_vl").processor)
    processor.image_token = "<own>"
    processor.tokenizer.add_tokens(AddedToken("<own>", **{"normalized": False, flag: True}))
    repeat_image_tokens(processor)
    assert "encode" not in vars(processor.tokenizer)


@pytest.mark.parametrize("other", ["{0}{0}", "x{0}y", "x<|im"])
def test_a_token_that_another_one_overlaps_is_left_to_the_tokenizer(tiny, other):
    processor = copy.deepcopy(tiny("qwen2_vl").processor)
    processor.tokenizer.add_tokens([AddedToken(other.format(processor.image_token), normalized=False)])
    repeat_image_tokens(processor)
    assert "encode" not in vars(processor.tokenizer)


def test_the_token_for_what_is_unknown_is_left_to_the_tokenizer(tiny):
    processor = copy.deepcopy(tiny("qwen2_vl").processor)
    processor.tokenizer.unk_token = processor.image_token
    repeat_image_tokens(processor)
    assert "encode" not in vars(processor.tokenizer)
