"""The header before a model's own template: what it renders, character by character, and what is read back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_templates
from transformers.utils.chat_template_utils import render_jinja_template
from vllm_rule import content_format

from gen2embed_mteb import HierarchicalPrompt
from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.chat_formats.detection import render
from gen2embed_mteb.embedder.chat_formats.header import (
    format_of,
    own_template,
    parts_of,
    prompt_of,
    template_with_prompt,
)
from gen2embed_mteb.embedder.families import FAMILIES, chat_template
from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES
from gen2embed_mteb.errors import Gen2EmbedError

PROMPT = HierarchicalPrompt("Sq", "Sd", "\nRt", "\nRi", "", "")
NONE = STRATEGIES["none"]
FOLDED = ChatFormat(system="folded", joiner="\n\n")


def messages(text: str, images: int = 0, system: str | None = None) -> list[dict]:
    parts = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
    said = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*said, {"role": "user", "content": parts}]


def rendered(template: str, chat_format: ChatFormat, text: str, images: int = 0, side: str = "query", **more) -> str:
    prompt = more.pop("prompt", PROMPT)
    found = template_with_prompt(template, prompt, chat_format)
    return render(found, messages(text, images, more.pop("system", None)), side, more)


CASES = [
    # text, images, query, document
    ("fox", 0, "<system>Sq</><user>fox\nRt</><assistant>", "<system>Sd</><user>fox</><assistant>"),
    ("", 1, "<system>Sq</><user><image>\nRi</><assistant>", "<system>Sd</><user><image></><assistant>"),
    ("fox", 1, "<system>Sq</><user><image>fox\nRi</><assistant>", "<system>Sd</><user><image>fox</><assistant>"),
    (
        "fox",
        2,
        "<system>Sq</><user><image><image>fox\nRi</><assistant>",
        "<system>Sd</><user><image><image>fox</><assistant>",
    ),
    ("", 0, "<system>Sq</><user>\nRt</><assistant>", "<system>Sd</><user></><assistant>"),
]


@pytest.mark.parametrize(("text", "images", "query", "document"), CASES)
@pytest.mark.parametrize("name", ["parts", "string system", "thinks, answered", "own system", "starts with blanks"])
def test_the_prompt_stands_around_the_input(name, text, images, query, document):
    formats = {
        "parts": (small_templates.PARTS, ChatFormat()),
        "string system": (small_templates.STRING_SYSTEM, ChatFormat(system="string")),
        "thinks, answered": (small_templates.THINKS, ChatFormat(no_thinking=True)),
        "own system": (small_templates.OWN_SYSTEM, ChatFormat()),
        "starts with blanks": (small_templates.STARTS_WITH_BLANKS, ChatFormat()),
    }
    ending = "<think></think>" if name.startswith("thinks") else ""
    assert rendered(*formats[name], text, images) == query + ending
    assert rendered(*formats[name], text, images, "document") == document + ending
    assert rendered(*formats[name], text, images, None) == document + ending


def test_a_string_gets_the_placeholders_from_the_format():
    chat_format = ChatFormat(system="string", user="string", image="<img/>")
    assert rendered(small_templates.STRINGS, chat_format, "fox") == "<system>Sq</><user>fox\nRt</><assistant>"
    expected = "<system>Sq</><user>one <img/> two <img/>\nRi</><assistant>"
    assert rendered(small_templates.STRINGS, chat_format, "one <|image_1|> two <|image_2|>", 2) == expected


def test_a_folded_system_text_begins_the_user_s_turn():
    raises = small_templates.RAISES_ON_SYSTEM
    assert rendered(raises, FOLDED, "fox") == "<user>Sq\n\nfox\nRt</><assistant>"
    assert rendered(raises, FOLDED, "fox", 1, "document") == "<user>Sd\n\n<image>fox</><assistant>"
    assert rendered(raises, FOLDED, "a <|image_1|> b", 1) == "<user>Sq\n\na <image> b\nRi</><assistant>"
    assert rendered(raises, replace(FOLDED, joiner="\n"), "", 1) == "<user>Sq\n<image>\nRi</><assistant>"
    assert rendered(raises, FOLDED, "fox", prompt=NONE) == "<user>fox</><assistant>"


MARKS = [
    ("<|image_1|>\nWhat is it?\n", 1, "<image>\nWhat is it?\n"),
    ("Look: <|image_1|> is it red?", 1, "Look: <image> is it red?"),
    ("Is it red? <|image_1|>", 1, "Is it red? <image>"),
    ("<|image_1|> or <|image_2|>?", 2, "<image> or <image>?"),
    ("<|image_1|> or <|image_2|>?", 1, "<image> or ?"),
    ("A <|image_1|> B", 3, "A <image><image><image> B"),
    ("<|image_1|>\nFind a page.\n", 0, "\nFind a page.\n"),
    ("Look: <|image_1|> gone", 0, "Look:  gone"),
    # Halves that a dropped mark held apart must not become a control token, whichever it is.
    ("<im<|image_1|>age>", 0, "<im age>"),
    ("<im<|image_1|><|image_2|><|image_3|>age>", 0, "<im age>"),
    ("a<|image_1|>b<|image_2|>c", 1, "a<image>b c"),
    ("<|image<|image_1|>_1|>", 0, "<|image _1|>"),
    ("<|image_10|> <|image|>", 0, "<|image_10|> <|image|>"),
    ("{{ messages }} {% if %} {# #}", 0, "{{ messages }} {% if %} {# #}"),
]


@pytest.mark.parametrize(("text", "images", "user"), MARKS)
def test_images_stand_where_the_text_marks_them(text, images, user):
    suffix = "\nRi" if images else "\nRt"
    assert rendered(small_templates.PARTS, ChatFormat(), text, images) == (
        f"<system>Sq</><user>{user}{suffix}</><assistant>"
    )


def test_a_template_that_moves_images_gets_one_text():
    chat_format = ChatFormat(images_first=True)
    assert rendered(small_templates.IMAGES_FIRST, chat_format, "one <|image_1|> two <|image_2|>", 2) == (
        "<system>Sq </><user><image>\n<image>\none  two \nRi </><assistant>"
    )
    assert rendered(small_templates.IMAGES_FIRST, replace(FOLDED, images_first=True), "fox", 1, "document") == (
        "<user><image>\nSd\n\nfox </><assistant>"
    )


def test_trimming_leaves_the_representation_prompt_on_its_line():
    trims = small_templates.TRIMS
    assert rendered(trims, ChatFormat(), " fox \n") == "<system>Sq</><user>fox \n\nRt</><assistant>"
    assert rendered(trims, ChatFormat(), " fox \n", 0, "document") == "<system>Sd</><user>fox</><assistant>"


def test_the_date_is_pinned():
    dated = small_templates.DATED
    assert rendered(dated, ChatFormat(pin_date=True), "fox") == (
        "<date>26 Jul 2024 2024-07-26</><system>Sq</><user>fox\nRt</><assistant>"
    )
    assert rendered(small_templates.DATED_ALONE, ChatFormat(pin_date=True), "fox", prompt=NONE) == (
        "<system>Today is Friday, 26 July 2024</><user>fox</><assistant>"
    )


def test_the_pinned_date_is_what_python_says_of_that_day():
    from datetime import UTC, datetime

    codes = "%Y %y %m %-m %B %b %h %d %-d %e %j %A %a %u %w %H %I %M %S %f %p %F %D %T %R"
    own = "{{ strftime_now('" + codes + "') }}"
    day = datetime(2024, 7, 26, tzinfo=UTC)
    assert rendered(own, ChatFormat(pin_date=True), "fox") == day.strftime(codes)


def test_bos_is_written_before_everything():
    assert rendered(small_templates.PARTS, ChatFormat(write_bos=True), "fox", bos_token="<s>") == (
        "<s><system>Sq</><user>fox\nRt</><assistant>"
    )


def test_placeholders_are_broken_up_in_the_conversation_but_not_in_the_prompt():
    chat_format = ChatFormat(broken_up=("<image>", "</>"))
    found = rendered(small_templates.PARTS, chat_format, "a<image>b</>", 1, prompt=replace(PROMPT, query_image=" </>"))
    assert found == "<system>Sq</><user><image>a< image>b< /> </></><assistant>"
    found = rendered(small_templates.PARTS, chat_format, "fox", system="be <image>")
    assert found == "<system>be < image></><user>fox\nRt</><assistant>"


def test_a_stated_system_text_replaces_the_prompt_s():
    assert rendered(small_templates.PARTS, ChatFormat(), "fox", system="mine") == (
        "<system>mine</><user>fox\nRt</><assistant>"
    )
    assert rendered(small_templates.PARTS, ChatFormat(), "fox", system="") == "<user>fox\nRt</><assistant>"


def test_content_may_be_a_string_and_an_image_may_have_a_url():
    template = template_with_prompt(small_templates.PARTS, PROMPT, ChatFormat())
    plain = [{"role": "system", "content": "mine"}, {"role": "user", "content": "fox"}]
    assert render(template, plain, "query") == "<system>mine</><user>fox\nRt</><assistant>"
    url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert render(template, url, "document") == "<system>Sd</><user><image></><assistant>"


def test_the_answer_is_begun_even_if_nobody_asks_for_it():
    template = template_with_prompt(small_templates.PARTS, PROMPT, ChatFormat())
    found, _ = render_jinja_template([messages("fox")], chat_template=template, add_generation_prompt=False)
    assert found == ["<system>Sd</><user>fox</><assistant>"]


def test_switches_that_are_off_leave_the_template_s_variables_alone():
    own = "{{ enable_thinking }} {{ strftime_now('%Y') | length }} {{ messages | length }}"
    assert rendered(own, ChatFormat(), "fox", enable_thinking=7) == "7 4 2"
    assert rendered("{{ enable_thinking is defined }}", ChatFormat(), "fox") == "False"
    assert rendered(small_templates.NAMES_SYSTEM_MESSAGE, ChatFormat(), "fox").startswith("<system>")


@pytest.mark.parametrize(
    "own", ["\n\n x", "  {%- if true %} x{% endif %}", "\t{# c #}\n x", " \n{{ 1 }}\n\n", "\r\n x"]
)
def test_the_own_template_renders_as_it_does_alone(own):
    alone, _ = render_jinja_template([messages("fox")], chat_template=own)
    assert rendered(own, ChatFormat(), "fox") == alone[0]


HOSTILE = HierarchicalPrompt("{{ 7 * 7 }} %} -%}\n", "\\n \\u0041", "\u2028\x85\r", "\"'", "{#- #}", "画像\x00")


@pytest.mark.parametrize("name", small_templates.FITTING)
@pytest.mark.parametrize("prompt", [*list(STRATEGIES.values())[::5], HOSTILE])
def test_prompt_format_and_own_template_are_read_back(name, prompt):
    own, chat_format = small_templates.FITTING[name], ChatFormat(write_bos=True, broken_up=("<a>", '"\\ {{'))
    found = template_with_prompt(own, prompt, chat_format)
    assert parts_of(found) == (own, prompt, chat_format)
    assert prompt_of(found) == prompt
    assert format_of(found) == chat_format
    assert own_template(found) == own
    assert template_with_prompt(own_template(found), NONE, chat_format) == template_with_prompt(own, NONE, chat_format)


def test_a_hostile_prompt_is_rendered_as_it_is():
    for own, text, images in ((small_templates.PARTS, "fox", 0), (small_templates.PARTS, "fox", 1)):
        suffix = HOSTILE.query_image if images else HOSTILE.query_text
        expected = f"<system>{HOSTILE.query_system}</><user>{'<image>' * images}fox{suffix}</><assistant>"
        assert rendered(own, ChatFormat(), text, images, prompt=HOSTILE) == expected


def test_nothing_is_read_from_another_s_template():
    for template in (None, "", {"default": _ours()}, small_templates.PARTS, "{%- set prompt = 7 -%}\n", "x" + _ours()):
        assert (parts_of(template), prompt_of(template), format_of(template)) == (None, None, None)
    assert own_template(small_templates.PARTS) == small_templates.PARTS


def test_a_hand_written_template_has_a_prompt_but_no_format():
    template = chat_template(FAMILIES["qwen2_vl"], PROMPT)
    assert (prompt_of(template), format_of(template), parts_of(template)) == (PROMPT, None, None)


def _ours() -> str:
    return template_with_prompt(small_templates.PARTS, PROMPT, ChatFormat())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"query_system"', '"system"', "prompt .*: not the six texts"),
        ('"Sq"', "7", "prompt .*: not the six texts"),
        ('"Sq"', "Sq", "prompt .*: not JSON"),
        ('"write_bos"', '"later"', r"unknown \['later'\] and missing \['write_bos'\]"),
        ("follows, unchanged", "is here", "not the line after which"),
    ],
)
def test_a_damaged_header_is_refused(old, new, message):
    template = _ours()
    assert old in template
    with pytest.raises(Gen2EmbedError, match=message):
        parts_of(template.replace(old, new, 1))


@pytest.mark.parametrize("name", small_templates.FITTING)
def test_vllm_takes_every_template_of_ours_for_one_with_parts(name):
    assert content_format(template_with_prompt(small_templates.FITTING[name], PROMPT, ChatFormat())) == "openai"


def test_the_search_of_vllm_tells_strings_from_parts():
    assert content_format(small_templates.STRINGS) == "string"
    assert content_format(small_templates.PARTS) == "openai"


def test_sentence_transformers_passes_the_side():
    from transformers.utils.chat_template_utils import _get_template_variables

    assert "task" in _get_template_variables(_ours())
