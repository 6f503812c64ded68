"""Pairs as conversations, and how a pair that is too long is cut."""

from __future__ import annotations

import pytest
from PIL import Image
from tiny_tokenizers import byte_level

from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.embedder.reranking.pairs import Pair, shortened
from gen2embed_mteb.errors import Gen2EmbedError


def test_messages_have_the_roles_of_sentence_transformers():
    image = Image.new("RGB", (8, 8))
    pair = Pair(Content("a", (image,), system="Judge."), Content("b"))
    assert pair.as_messages() == [
        {"role": "system", "content": [{"type": "text", "text": "Judge."}]},
        {"role": "query", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]},
        {"role": "document", "content": [{"type": "text", "text": "b"}]},
    ]
    assert Pair(Content("a"), None).as_messages() == [
        {"role": "query", "content": [{"type": "text", "text": "a"}]},
    ]


def test_the_longer_text_loses_its_end():
    tokenizer = byte_level([], {}, None)
    query, candidate = "k z " * 20, "q j " * 5

    def count(text):
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = shortened(Pair(Content(query), Content(candidate)), 4, tokenizer)
    assert found.candidate.text == candidate
    assert query.startswith(found.query.text)
    assert count(found.query.text) == count(query) - 4
    # The other way round, with more to cut than the difference of the two: both keep half of what is left.
    excess = count(query) - count(candidate) + 4
    found = shortened(Pair(Content(candidate), Content(query)), excess, tokenizer)
    assert (count(found.query.text), count(found.candidate.text)) == (count(candidate) - 2, count(candidate) - 2)
    assert shortened(Pair(Content("k"), Content("k")), 10_000, tokenizer) == Pair(Content(""), Content(""))


def test_without_a_text_nothing_can_be_cut():
    with pytest.raises(Gen2EmbedError, match="a pair has 7 tokens more than max_seq_length, and no text"):
        shortened(Pair(Content(""), Content("")), 7, byte_level([], {}, None))
