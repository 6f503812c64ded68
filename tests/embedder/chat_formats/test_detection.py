"""Detection by trying: the format of small templates of every kind, and of the published ones where they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import small_templates
from vllm_rule import content_format

from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.chat_formats.detection import candidates, detect, render, unprompted_text
from gen2embed_mteb.embedder.chat_formats.header import template_with_prompt
from gen2embed_mteb.embedder.prompts.strategies import REPRESENT_IMAGE, REPRESENT_TEXT, STRATEGIES, SYSTEM
from gen2embed_mteb.errors import Gen2EmbedError

FOLDED = ChatFormat(system="folded", joiner="\n\n")
FOUND = {
    "parts": ChatFormat(),
    "string system": ChatFormat(system="string"),
    "raises on system": FOLDED,
    "drops system": FOLDED,
    "own system": ChatFormat(),
    "thinks": ChatFormat(no_thinking=True),
    "trims": ChatFormat(),
    "dated": ChatFormat(pin_date=True),
    "dated alone": ChatFormat(pin_date=True),
    "images first": ChatFormat(images_first=True),
    "images last": ChatFormat(images_first=True),
    "numbered": ChatFormat(),
    "counted first": replace(FOLDED, images_first=True),
    "starts with blanks": ChatFormat(),
    "names system_message": ChatFormat(),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_format_of_each_kind_is_found(name):
    assert detect(small_templates.FITTING[name]).chat_format == FOUND[name]


def test_strings_are_found_with_and_without_images():
    assert detect(small_templates.STRINGS, images=False).chat_format == ChatFormat(system="string", user="string")
    found = detect(small_templates.STRINGS, image="<img/>").chat_format
    assert found == ChatFormat(system="string", user="string", image="<img/>")


def test_strings_without_a_system_role_are_folded():
    found = detect(small_templates.STRINGS_RAISE_ON_SYSTEM, images=False).chat_format
    assert found == replace(FOLDED, user="string")


def test_a_system_text_that_is_said_twice_is_folded():
    assert detect(small_templates.SAYS_SYSTEM_TWICE).chat_format == FOLDED


def test_there_are_eight_candidates_and_strings_come_last():
    found = [(one.system, one.joiner, one.user, one.image) for one in candidates("<i>")]
    systems = [("parts", ""), ("string", ""), ("folded", "\n\n"), ("folded", "\n")]
    assert found == [(*system, *user) for user in (("parts", ""), ("string", "<i>")) for system in systems]


REASONS = {
    "string system": "Not the system text as a list of parts, the user's turn as a list of parts: a Python list",
    "raises on system": "the template raises TemplateError: no system role",
    "thinks": "enable_thinking is false",
    "trims": "The template trims texts",
    "dated": "pinned to 26 July 2024",
    "images first": "MMEB's marks <|image_1|> in the text are lost",
    "own system": "Without a system text the template says by itself: 'You are a helpful assistant.'",
    "drops system": "the system text is there 0 times",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reasons_say_why(name):
    reasons = "\n".join(detect(small_templates.FITTING[name]).reasons)
    assert REASONS[name] in reasons
    assert "no rule is broken" in reasons


def test_a_plain_template_needs_one_reason():
    assert len(detect(small_templates.PARTS).reasons) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (small_templates.ALWAYS_THINKS, "the answer begins with an open <think>"),
        (small_templates.ALWAYS_THINKS.replace("<think>", "[THINK]"), "the answer begins with an open [THINK]"),
        (small_templates.NO_IMAGES, "there are not 1 placeholders of images (query, an image)"),
        (small_templates.NO_ENDING.replace("{{ '</>' }}", ""), "nothing stands behind the user's turn"),
        (small_templates.TAMPERS, "something stands between the user's text and the representation prompt"),
        ("{{ raise_exception('never') }}", "the template raises TemplateError: never"),
        ("{{ messages", "the template raises TemplateSyntaxError"),
        ("", "the user's text is not there once"),
        ("{{ messages }}<a>", "a Python list is printed"),
    ],
)
def test_where_no_format_fits_the_broken_rules_are_named(template, message):
    with pytest.raises(Gen2EmbedError, match="no chat format fits") as error:
        detect(template)
    assert message in str(error.value)
    assert str(error.value).count("the user's turn as") == 8  # every candidate
    assert "processor_kwargs={'chat_template': …}" in str(error.value)


def test_a_text_only_model_may_leave_images_out():
    assert detect(small_templates.NO_IMAGES, images=False).chat_format == ChatFormat()


def test_what_a_template_says_by_itself():
    own = small_templates.OWN_SYSTEM
    assert unprompted_text(own, ChatFormat()) == "You are a helpful assistant."
    assert unprompted_text(small_templates.PARTS, ChatFormat()) == ""


# The published templates: what each of the formats found there was checked by eye, and is written down here.
TEMPLATES = os.environ.get("GEN2EMBED_TEMPLATES", "")
PUBLISHED = {
    "glm4_1v": ChatFormat(system="string"),
    "llava_1_5": ChatFormat(images_first=True),
    "llava_next_mistral": ChatFormat(images_first=True),
    "llava_onevision": ChatFormat(images_first=True),
    "mistral3": ChatFormat(pin_date=True),
    "qwen3_5_think": ChatFormat(no_thinking=True),
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = "<|im_start|>system\n{0}<|im_end|>\n<|im_start|>user\n{1}<|im_end|>\n<|im_start|>assistant\n"
MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_QUERY = {
    "qwen2_5_vl": CHATML.format(SYSTEM, MARKER + "fox" + REPRESENT_IMAGE),
    "qwen3_vl": CHATML.format(SYSTEM, MARKER + "fox" + REPRESENT_IMAGE),
    "qwen3_5_think": CHATML.format(SYSTEM, MARKER + "fox" + REPRESENT_IMAGE) + "<think>\n\n</think>\n\n",
    "qwen3_5_nothink": CHATML.format(SYSTEM, MARKER + "fox" + REPRESENT_IMAGE) + "<think>\n\n</think>\n\n",
    "internvl_ctx": CHATML.format(SYSTEM, "<IMG_CONTEXT>\nfox" + REPRESENT_IMAGE),
    "qwen2_5_omni": CHATML.format(SYSTEM, "<|vision_bos|><|IMAGE|><|vision_eos|>fox" + REPRESENT_IMAGE),
    "llava_1_5": f"{SYSTEM} USER: <image>\nfox{REPRESENT_IMAGE} ASSISTANT:",
    "llava_next_mistral": f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n[INST] <image>\nfox{REPRESENT_IMAGE} [/INST]",
    "mistral3": f"<s>[SYSTEM_PROMPT]{SYSTEM}[/SYSTEM_PROMPT][INST][IMG]fox{REPRESENT_IMAGE}[/INST]",
    "smolvlm": f"<|im_start|>System: {SYSTEM}<end_of_utterance>\nUser:<image>fox{REPRESENT_IMAGE}<end_of_utterance>\n"
    "Assistant:",
    "idefics3": f"<|begin_of_text|>System: {SYSTEM}<end_of_utterance>\nUser:<image>fox{REPRESENT_IMAGE}"
    "<end_of_utterance>\nAssistant:",
    "glm4_1v": f"[gMASK]<sop><|system|>\n{SYSTEM}<|user|>\n<|begin_of_image|><|image|><|end_of_image|>fox"
    f"{REPRESENT_IMAGE}<|assistant|>\n",
    "llava_onevision": f"<|im_start|>system \n{SYSTEM}<|im_end|><|im_start|>user <image>\nfox{REPRESENT_IMAGE}"
    "<|im_end|><|im_start|>assistant\n",
}
published = pytest.mark.skipif(not TEMPLATES, reason="GEN2EMBED_TEMPLATES names no folder of published templates")


def files() -> list[Path]:
    return sorted(Path(TEMPLATES).glob("*.jinja")) if TEMPLATES else []


@published
@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_a_published_template_is_detected(path):
    template = path.read_text(encoding="utf-8")
    found = detect(template, TOKENS).chat_format
    if path.stem in PUBLISHED or path.stem in IMAGE_QUERY:
        assert found == PUBLISHED.get(path.stem, ChatFormat())
    ours = template_with_prompt(template, STRATEGIES["hierarchical"], found)
    assert content_format(ours) == "openai"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "fox"}]}]
    if path.stem in IMAGE_QUERY:
        assert render(ours, messages, "query", TOKENS) == IMAGE_QUERY[path.stem]
    for side in ("query", "document"):
        text = render(ours, [{"role": "user", "content": "fox"}], side, TOKENS)
        assert text.count(SYSTEM) == text.count("fox") == 1
        assert text.count(REPRESENT_TEXT.strip()) == (side == "query")


@published
@pytest.mark.parametrize("name", STRATEGIES)
def test_qwen3_vl_is_rendered_as_by_the_template_written_by_hand(name):
    """So its own template carries the prompt; the one by hand is for the official layout, and for want of another."""
    from gen2embed_mteb.embedder.families import FAMILIES, chat_template

    own = (Path(TEMPLATES) / "qwen3_vl.jinja").read_text(encoding="utf-8")
    prompt = STRATEGIES[name]
    generic = template_with_prompt(own, prompt, detect(own).chat_format)
    by_hand = chat_template(FAMILIES["qwen3_vl"], prompt)
    for text in ("fox", "", "<|image_1|>\nWhat?\n", "a <|image_1|> b <|image_2|>"):
        for images in (0, 1, 2):
            parts = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
            for side in ("query", "document", None):
                messages = [{"role": "user", "content": parts}]
                assert render(generic, messages, side) == render(by_hand, messages, side)


@pytest.mark.exhaustive
def test_a_format_that_is_found_is_a_fixed_point():
    for name, template in small_templates.FITTING.items():
        found = detect(template, image="<i>").chat_format
        for switch in ("no_thinking", "pin_date"):
            if getattr(found, switch):
                messages = [{"role": "user", "content": "fox"}]
                prompts = (STRATEGIES["none"], STRATEGIES["hierarchical"])
                on, off = (
                    [render(template_with_prompt(template, prompt, one), messages) for prompt in prompts]
                    for one in (found, replace(found, **{switch: False}))
                )
                assert on != off, (name, switch)
