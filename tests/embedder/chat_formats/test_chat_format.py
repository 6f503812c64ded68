"""`ChatFormat`: its JSON, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.errors import Gen2EmbedError

FORMATS = (
    ChatFormat(),
    ChatFormat(system="string", user="string", image="<image>"),
    ChatFormat(system="folded", joiner="\n\n", images_first=True, no_thinking=True, pin_date=True),
    ChatFormat(system="folded", joiner="\n", write_bos=True, sanitize=False, broken_up=("<a b>", "画像", '"\\{{')),
)


@pytest.mark.parametrize("chat_format", FORMATS)
def test_json_holds_every_field_on_one_line(chat_format):
    text = chat_format.to_json()
    assert "\n" not in text
    assert set(json.loads(text)) == {field.name for field in fields(ChatFormat)}
    assert ChatFormat.from_json(text) == chat_format


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("system", "text", "system is 'text'; known: parts, string, folded"),
        ("user", "folded", "user is 'folded'; known: parts, string"),
        ("joiner", "\n", "joiner is '\\n'; with system='parts'"),
        ("no_thinking", 1, "no_thinking is 1, not a bool"),
        ("image", None, "image is None, not a str"),
        ("broken_up", "<image>", "broken_up is '<image>', not a tuple"),
        ("broken_up", ["<image>", 7], "broken_up holds something"),
        ("broken_up", ["|"], "two characters or more"),
    ],
)
def test_a_value_of_another_kind_is_refused(key, value, message):
    with pytest.raises(Gen2EmbedError) as error:
        ChatFormat.from_json(json.dumps({**json.loads(ChatFormat().to_json()), key: value}))
    assert message in str(error.value)


def test_a_folded_system_text_needs_a_joiner():
    with pytest.raises(Gen2EmbedError, match="joiner is ''; with system='folded'"):
        ChatFormat(system="folded")


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", '{"system": "parts"}', "[" * 100_000])
def test_what_is_not_a_format_is_refused(text):
    with pytest.raises(Gen2EmbedError, match="chat format"):
        ChatFormat.from_json(text)


def test_unknown_and_missing_keys_are_named():
    found = json.loads(ChatFormat().to_json())
    del found["write_bos"]
    with pytest.raises(Gen2EmbedError, match=r"unknown \['later'\] and missing \['write_bos'\].*update gen2embed"):
        ChatFormat.from_json(json.dumps({**found, "later": True}))
