"""The tokens of answers behind the opened turn of the assistant."""

from __future__ import annotations

import pytest
from tiny_models import _llama_tokenizer as blanks_as_letters
from tiny_tokenizers import byte_level

from gen2embed_mteb.embedder.reranking.answers import answer_text, answer_tokens, option_tokens
from gen2embed_mteb.errors import Gen2EmbedError


@pytest.mark.parametrize(
    ("rendered", "text"),
    [
        ("USER: a ASSISTANT:", " Yes"),
        ("[INST] a [/INST]", " Yes"),
        ("<|im_start|>assistant\n", "Yes"),
        ("a<|im_end|>", "Yes"),
        ("ASSISTANT: ", "Yes"),
    ],
)
def test_a_blank_follows_a_word_or_a_bracket(rendered, text):
    assert answer_text(byte_level(["<|im_start|>", "<|im_end|>"], {}, None), rendered, "Yes") == text


def test_the_tokens_continue_those_of_the_prompt():
    tokenizer = byte_level(["<|im_start|>"], {}, None)
    rendered = "<|im_start|>assistant\n"
    before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    after = tokenizer(rendered + "Bx", add_special_tokens=False)["input_ids"]
    assert after[: len(before)] == before
    assert answer_tokens(tokenizer, rendered, "Bx") == after[len(before) :]
    assert option_tokens(tokenizer, rendered, ("A", "B")) == tuple(tokenizer.convert_tokens_to_ids(["A", "B"]))


def test_a_blank_that_is_a_token_of_its_own_is_left_out():
    tokenizer = blanks_as_letters()
    assert tokenizer.tokenize(" A")[0] == tokenizer.tokenize(" B")[0]
    first, second = option_tokens(tokenizer, "[INST] a [/INST]", ("A", "B"))
    assert tokenizer.convert_ids_to_tokens([first, second]) == ["<0x41>", "<0x42>"] or (
        tokenizer.decode([first]) == "A" and tokenizer.decode([second]) == "B"
    )


def test_answers_that_begin_alike_are_refused():
    tokenizer = byte_level([], {}, None)
    with pytest.raises(Gen2EmbedError, match="begins the answers 'Qx' and 'Qy' with the same token"):
        option_tokens(tokenizer, "a\n", ("Qx", "Qy"))
