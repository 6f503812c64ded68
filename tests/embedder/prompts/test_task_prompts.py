"""The strategies whose texts name the task: rendered character by character in every kind of template."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_templates
import tiny_any
from samples import sample_of
from vllm_rule import content_format

from gen2embed_mteb.embedder.chat_formats.detection import detect, render
from gen2embed_mteb.embedder.chat_formats.header import (
    open_template,
    parts_of,
    prompt_of,
    template_with_prompt,
    variables_of,
    with_phrase,
)
from gen2embed_mteb.embedder.families import FAMILIES, chat_template
from gen2embed_mteb.embedder.prompts.slots import SLOTS, TaskSlots
from gen2embed_mteb.embedder.prompts.strategies import (
    TASK_STRATEGIES,
    HierarchicalPrompt,
    dataset_prompt_name,
    prompts_of_datasets,
    strategy,
    task_prompt,
)
from gen2embed_mteb.errors import Gen2EmbedError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
VQA = SLOTS["OK-VQA"]
ENDING = (
    "\nSay in one word what it means, with what the question asks for before all else.\n"
    "The word must have a meaning of its own: no article, no preposition, no symbol."
)
FREERET = {
    "query": "\nAbove is a photo with a question. It will be compared with an answer by what the question asks for."
    + ENDING,
    "document": "\nAbove is an answer. It will be compared with a photo with a question by what the question asks for."
    + ENDING,
}
PHRASE = "What the question asks for in one word:"
LENS = {
    side: f"You will be given {own}, which will be compared with {other}. Attend to one thing in it: what the question "
    f'asks for. Your answer sums that up, and begins with "{PHRASE}"'
    for side, own, other in (
        ("query", "a photo with a question", "an answer"),
        ("document", "an answer", "a photo with a question"),
    )
}
HOSTILE = TaskSlots("{aspect} {{ 7 * 7 }} %}", "-%} {own} 'x' \"y\"", "{other} {% raw %} \\n {phrase}")
INPUTS = (("fox", 0), ("", 1), ("fox", 1), ("fox", 2), ("fox\n", 0))
CALLERS = (None, "", "one line", "first\nlast", "a\n\nb c \n", "\n x \n", "{{ 1 }} -%}\n{% if %}", "<|im_end|>\nx")


def messages(text: str, images: int, system: str | None = None, *, parts: bool = True) -> list[dict]:
    content = [{"type": "image"}] * images + ([{"type": "text", "text": text}] if text else [])
    said = [{"type": "text", "text": system}] if parts else system
    return [*([] if system is None else [{"role": "system", "content": said}]), {"role": "user", "content": content}]


def test_the_texts_of_freeret_stand_after_the_content_and_there_is_no_system_turn():
    prompt = task_prompt("freeret", VQA)
    assert prompt == HierarchicalPrompt(
        "", "", FREERET["query"], FREERET["query"], FREERET["document"], FREERET["document"], caller="after"
    )
    assert FREERET["query"].count("\n") == 3  # three sentences


def test_the_phrase_of_lens_is_told_before_the_content_and_begins_the_answer():
    prompt = task_prompt("lens", VQA)
    assert prompt == HierarchicalPrompt(LENS["query"], LENS["document"], "", "", "", "", PHRASE, PHRASE, "phrase")


def test_the_default_slots_fit_any_task_and_give_the_strategies_their_names():
    assert strategy("freeret").query_text.startswith("\nAbove is an input. It will be compared with a candidate by")
    assert strategy("lens").document_phrase == "The meaning in one word:"
    assert [strategy(name).name for name in TASK_STRATEGIES] == ["freeret", "lens"]
    assert task_prompt("lens", VQA).name == "custom"
    with pytest.raises(Gen2EmbedError, match="'hierarchical' has no slots"):
        task_prompt("hierarchical", VQA)


def test_braces_in_slots_are_text():
    prompt = task_prompt("freeret", HOSTILE)
    assert prompt.query_text.startswith(
        "\nAbove is {aspect} {{ 7 * 7 }} %}. It will be compared with -%} {own} 'x' \"y\" by {other} {% raw %} \\n "
        "{phrase}.\n"
    )


SMALL = {
    "parts": ("<system>{system}</><user>{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
    "string system": ("<system>{system}</><user>{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
    "strings": ("<system>{system}</><user>{images}{text}{suffix}</><assistant>{phrase}", "<i>"),
    "raises on system": ("<user>{system}\n\n{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
    "drops system": ("<user>{system}\n\n{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
    "says system twice": ("<user>{system}\n\n{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
    "thinks": ("<system>{system}</><user>{images}{text}{suffix}</><assistant><think></think>{phrase}", "<image>"),
    "starts with blanks": ("<system>{system}</><user>{images}{text}{suffix}</><assistant>{phrase}", "<image>"),
}


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("name", sample_of(SMALL, list(SMALL)[::2]))
def test_small_templates_of_every_form(name, side):
    form, image = SMALL[name]
    own = getattr(small_templates, name.upper().replace(" ", "_"), None) or small_templates.FITTING[name]
    chat_format = detect(own, image="<i>").chat_format
    for strategy_name in TASK_STRATEGIES:
        template = template_with_prompt(own, task_prompt(strategy_name, VQA), chat_format)
        lens = strategy_name == "lens"
        for text, images in INPUTS:
            expected = form.format(
                system=LENS[side] if lens else "",
                images=image * images,
                text=text,
                suffix="" if lens else FREERET[side],
                phrase=PHRASE if lens else "",
            )
            if not lens:  # not even an empty turn
                expected = expected.replace("<system></>", "").replace("<user>\n\n", "<user>", 1)
            assert render(template, messages(text, images), side, TOKENS) == expected


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_templates_written_by_hand(family, side):
    record = FAMILIES[family]
    for text, images in INPUTS:
        body = record.image * images + text
        freeret = render(chat_template(record, task_prompt("freeret", VQA)), messages(text, images), side, TOKENS)
        lens = render(chat_template(record, task_prompt("lens", VQA)), messages(text, images), side, TOKENS)
        if family == "llava_next":
            assert freeret == f"[INST] {body}{FREERET[side]} [/INST]"
            assert lens == f"[INST] {LENS[side]}\n{body} [/INST] {PHRASE}"
        elif family == "phi3_v":
            body = "".join(f"<|image_{number}|>" for number in range(1, images + 1)) + text
            assert freeret == f"<|user|>\n{body}{FREERET[side]}<|end|>\n<|assistant|>\n"
            assert lens == (f"<|system|>\n{LENS[side]}<|end|>\n<|user|>\n{body}<|end|>\n<|assistant|>\n{PHRASE}")
        else:
            assert freeret == f"<|im_start|>user\n{body}{FREERET[side]}<|im_end|>\n<|im_start|>assistant\n"
            assert lens == (
                f"<|im_start|>system\n{LENS[side]}<|im_end|>\n<|im_start|>user\n{body}<|im_end|>\n"
                f"<|im_start|>assistant\n{PHRASE}"
            )


def all_templates() -> dict[str, str]:
    tiny = {path.stem: path.read_text(encoding="utf-8") for path in Path(tiny_any.TEMPLATES).glob("*.jinja")}
    endings = {
        "ends in a line break": small_templates.PARTS + "\n",
        "ends in two": small_templates.PARTS + "\n\n",
        "ends in CRLF": small_templates.PARTS + "\r\n",
        "ends in blanks": small_templates.PARTS + "\n  \n",
        "ends in a block": small_templates.PARTS + "{% if true %}{% endif %}\n",
        "writes our phrase": small_templates.PARTS + "{# {{ gen2embed_phrase }} #}",
    }
    return {**small_templates.FITTING, **tiny, **endings}


@pytest.mark.parametrize("name", sample_of(all_templates(), list(all_templates())[::4]))
def test_what_a_caller_passes_takes_the_place_of_the_texts(name):
    """A system message renders as a prompt would that has its texts: live prompts and built-in ones are the same."""
    own = all_templates()[name]
    pictures = int("image" in own)
    chat_format = detect(own, TOKENS, images=bool(pictures), image="<i>").chat_format
    given = open_template(with_phrase(own, strategy("lens")))  # compiled once; prompts are variables of it
    for strategy_name in TASK_STRATEGIES:
        prompt = task_prompt(strategy_name, HOSTILE)
        template = template_with_prompt(own, prompt, chat_format)
        assert parts_of(template) == (own, prompt, chat_format)
        assert prompt_of(template) == prompt
        for side in ("query", "document"):
            for number, caller in enumerate(CALLERS):
                made = prompt.with_caller(caller)
                variables = {**TOKENS, **variables_of(made, chat_format), "gen2embed_phrase": made.phrase(side)}
                expected = render(given, messages("fox", pictures), side, variables)
                said = messages("fox", pictures, caller, parts=bool(number % 2))
                assert render(template, said, side, TOKENS) == expected
                assert expected.endswith(made.phrase(side))
            # What stands before the phrase is what the model's own template writes, to the last line break.
            plain = template_with_prompt(own, HierarchicalPrompt(*list(prompt.texts.values())[:6]), chat_format)
            before = render(plain, messages("fox", pictures), side, TOKENS)
            assert render(template, messages("fox", pictures), side, TOKENS) == before + prompt.phrase(side)


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("family", sample_of(FAMILIES))
def test_the_same_for_templates_written_by_hand(family, layout):
    record = FAMILIES[family]
    for prompt in (task_prompt(name, slots) for name in TASK_STRATEGIES for slots in (VQA, HOSTILE)):
        template = chat_template(record, prompt, layout)
        assert prompt_of(template) == prompt
        assert content_format(template) == "openai"
        for side in ("query", "document"):
            for caller in CALLERS[::2]:
                other = chat_template(record, prompt.with_caller(caller), layout)
                assert render(template, messages("fox", 1, caller), side) == render(other, messages("fox", 1), side)


@pytest.mark.parametrize("name", TASK_STRATEGIES)
def test_a_dataset_s_prompt_is_what_a_caller_passes_to_get_its_texts(name):
    found = prompts_of_datasets(strategy(name))
    for dataset, slots in SLOTS.items():
        for side in ("query", "document"):
            made, given = (
                task_prompt(name, slots),
                strategy(name).with_caller(found[dataset_prompt_name(dataset, side)]),
            )
            assert given.system(side) == made.system(side)
            assert given.suffix(side, False) == given.suffix(side, True) == made.suffix(side, False)
            assert given.phrase(side) == made.phrase(side)


def test_a_placeholder_in_what_a_caller_passes_is_broken_up_as_in_a_text():
    own = small_templates.PARTS
    chat_format = detect(own).chat_format
    chat_format = type(chat_format)(**{**vars(chat_format), "broken_up": ("<image>",)})
    for name in TASK_STRATEGIES:
        template = template_with_prompt(own, strategy(name), chat_format)
        rendered = render(template, messages("fox", 0, "look <image>\nat <image>"), "query")
        assert rendered.count("< image>") == 2
        assert "<image>" not in rendered


def test_templates_of_other_prompts_are_those_of_earlier_versions():
    """Fingerprints contain the template: stored vectors of the paper's strategies must stay valid."""
    template = template_with_prompt(
        "OWN", HierarchicalPrompt("a", "b", "c", "d", "e", "f"), detect(small_templates.PARTS)[0]
    )
    assert template.startswith(
        '{%- set gen2embed_prompt = {"query_system": "a", "document_system": "b", "query_text": "c", '
        '"query_image": "d", "document_text": "e", "document_image": "f"} -%}\n{%- set gen2embed_format = '
    )
    assert "gen2embed_phrase" not in template
    assert template.endswith("OWN")


@pytest.mark.parametrize("fault", [" x", "x\n", "a\nb"])
def test_a_phrase_is_one_line(fault):
    with pytest.raises(Gen2EmbedError, match="must be one line"):
        HierarchicalPrompt(query_phrase=fault)
    with pytest.raises(Gen2EmbedError, match="caller is 'nowhere'; known: system, after, phrase"):
        HierarchicalPrompt(caller="nowhere")


def test_a_template_that_lost_its_phrase_is_refused():
    template = template_with_prompt(small_templates.PARTS, strategy("lens"), detect(small_templates.PARTS)[0])
    with pytest.raises(Gen2EmbedError, match="does not write the phrase at its end"):
        parts_of(template.replace("{{ gen2embed_phrase }}", ""))
