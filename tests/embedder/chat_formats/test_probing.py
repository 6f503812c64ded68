"""What only a processor tells: BOS, and that control tokens in a text never act as such."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from PIL import Image
from tiny_any import ANY, TEXT_ONLY

from gen2embed_mteb.embedder.chat_formats.probing import chat_format_of, takes_images, template_of
from gen2embed_mteb.errors import Gen2EmbedError

PICTURE = Image.new("RGB", (56, 70), "teal")

# How control tokens in a text are kept from acting, as found for each family: by transformers alone; with placeholders
# broken up, where the processor counts those itself; or all broken up, where its tokenizer cannot be asked.
SANITIZES = ("llama", "qwen3", "gemma3_text", "qwen3_5", "glm4v", "llava", "llava_onevision", "ovis2")
BREAKS_PLACEHOLDERS = {
    "gemma3": {"<start_of_image>", "<end_of_image>", "<image_soft_token>"},
    "internvl": {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"},
    "aya_vision": {"<image>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"},
}


@pytest.mark.parametrize("name", ANY)
def test_the_way_is_the_first_that_works(tiny, name):
    chat_format = tiny(name).chat_format
    if name in SANITIZES:
        assert (chat_format.sanitize, chat_format.broken_up) == (True, ())
    elif name in BREAKS_PLACEHOLDERS:
        assert (chat_format.sanitize, set(chat_format.broken_up)) == (True, BREAKS_PLACEHOLDERS[name])
    else:
        assert not chat_format.sanitize
        tokenizer = tiny(name).tokenizer
        assert set(tokenizer.all_special_tokens) - {""} <= set(chat_format.broken_up)


@pytest.mark.parametrize("name", ANY)
def test_hostile_texts_keep_the_number_of_every_control_token(tiny, name):
    """Each control token alone, doubled, next to a word, in halves around a mark, and all at once."""
    model = tiny(name)
    tokens = [token for token in model.tokenizer.all_special_tokens if len(token) > 1]
    texts = ["fox", " ".join(tokens), "".join(tokens)]
    for token in tokens[:12]:
        half = len(token) // 2
        texts += [token, token * 2, f"a{token}b", f"{token[:half]}<|image_1|>{token[half:]}"]
    control = set(model.tokenizer.convert_tokens_to_ids(tokens)) - {model.tokenizer.pad_token_id}
    for images in (0, 1) if model.takes_images else (0,):
        counts = set()
        for text in texts:
            given = {"text": text, "image": PICTURE} if images else text
            ids = model.preprocess([given], task="query")["input_ids"][0].tolist()
            counts.add(frozenset(Counter(one for one in ids if one in control).items()))
        assert len(counts) == 1, name


@pytest.mark.parametrize("name", ANY)
def test_an_input_begins_with_exactly_one_bos(tiny, name):
    model = tiny(name)
    ids = model.preprocess(["fox"], task="query")["input_ids"][0].tolist()
    bos = model.tokenizer.bos_token_id
    if ANY[name].bos is None:
        assert bos is None
    else:
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert model.chat_format.write_bos == (name == "llava")


@pytest.mark.parametrize("name", ["llava", "gemma3", "llama"])
def test_the_tokens_are_those_of_the_rendered_text(tiny, name):
    """A server that adds no special tokens gets the same tokens."""
    model = tiny(name)
    rendered = model.render("a red fox", "query")
    ids = model.preprocess(["a red fox"], task="query")["input_ids"][0].tolist()
    assert model.tokenizer(rendered, add_special_tokens=False)["input_ids"] == ids


def test_a_word_that_is_no_token_is_left_as_it_is(tiny):
    """Aya Vision's processor has a `tile_token`, "TILE", which is a word."""
    assert "a TILE" in tiny("aya_vision").render("a TILE", "document")


def test_takes_images(tiny):
    assert {name for name in ANY if not takes_images(tiny(name).processor)} == set(TEXT_ONLY)


def test_the_template_of_a_processor_or_else_of_its_tokenizer():
    class Tokenizer:
        chat_template = "of the tokenizer"
        name_or_path = "some/model"

    class Processor:
        chat_template = None
        tokenizer = Tokenizer()

    assert template_of(Processor()) == "of the tokenizer"
    Processor.chat_template = {"default": "of the processor", "tool_use": "with tools"}
    assert template_of(Processor()) == "of the processor"
    Tokenizer.chat_template = " \n"
    with pytest.raises(Gen2EmbedError, match="some/model has no chat template"):
        template_of(Tokenizer())


def test_a_processor_that_writes_behind_the_prompt_is_refused(tiny_dir):
    """The embedding is the state at the last token, which must be the prompt's."""
    from transformers import AutoProcessor

    from gen2embed_mteb.embedder.model_folder.compat import install

    install()
    processor = AutoProcessor.from_pretrained(tiny_dir("llava_onevision"), use_fast=False)
    from tokenizers.processors import TemplateProcessing

    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    with pytest.raises(Gen2EmbedError, match=r"'<\|im_end\|>' behind the prompt"):
        chat_format_of(processor)


def test_named_templates_without_a_default_are_listed():
    class Tokenizer:
        chat_template: ClassVar[dict[str, str]] = {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
        name_or_path = "org/model"

    with pytest.raises(
        Gen2EmbedError, match="org/model has chat templates named rag, tool_use, but none named default"
    ):
        template_of(Tokenizer())
    assert template_of(type("Named", (), {"chat_template": {"default": "a", "rag": "b"}})()) == "a"
