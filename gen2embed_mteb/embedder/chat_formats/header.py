"""The template that carries the prompt: a header with the prompt and the chat format, then the model's own template.

1. The first two lines hold the prompt and the format as JSON, so that an exported model can be read back.
2. `header.jinja` follows: it builds the conversation anew, with the prompt in it.
3. The model's own template follows, unchanged, after a line that marks its beginning.

A prompt with a phrase, or that stands after the content, adds two things: `caller_prompt.jinja` before the header, and
the phrase behind the model's own template, whose last words begin the assistant turn.

The template needs nothing of this package: stock processors render it, with `task` ("query", "document" or undefined)
as a variable.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError

# transformers compiles templates with `trim_blocks`: the line break after this comment is dropped, and none of the
# template's own. A comment that ends in `-#}` would drop those too.
_BEGINNING = "{#- The model's own chat template follows, unchanged. #}\n"
_PHRASE = "{{ gen2embed_phrase }}"
# Jinja drops one line break at the end of a template, which must stay the last character.
_LAST_BREAK = re.compile(r"(\r\n|\r|\n)?\Z")
_GENERIC = re.compile(r"\{%- set gen2embed_prompt = (\{.*\}) -%\}\n\{%- set gen2embed_format = (\{.*\}) -%\}\n")
_HAND_WRITTEN = re.compile(r"\{%- set prompt = (\{.*\}) -%\}\n")


class PromptedTemplate(NamedTuple):
    """The three parts of a template that `template_with_prompt` made."""

    own: str
    prompt: HierarchicalPrompt
    chat_format: ChatFormat


def template_with_prompt(template: str, prompt: HierarchicalPrompt, chat_format: ChatFormat) -> str:
    """Return a chat template that renders a prompt through a model's own template.

    Args:
        template: The model's own chat template.
        prompt: The prompt's texts.
        chat_format: How the template wants its conversation (see `detection.detect`).
    """
    return (
        # JSON strings are Jinja strings as long as non-ASCII characters stay as they are.
        f"{{%- set gen2embed_prompt = {json.dumps(prompt.texts, ensure_ascii=False)} -%}}\n"
        f"{{%- set gen2embed_format = {chat_format.to_json()} -%}}\n{caller_template(prompt)}"
        f"{open_template(with_phrase(template, prompt))}"
    )


def caller_template(prompt: HierarchicalPrompt, own_names: str = "") -> str:
    """Return what is written before a template for a prompt that takes a caller's text in a place of its own.

    Args:
        prompt: The prompt.
        own_names: The variable that holds the prompt in a template written by hand; empty for `gen2embed_prompt`.

    Returns:
        An empty text for a prompt without a phrase that a caller's system turn replaces.
    """
    if "caller" not in prompt.texts:
        return ""
    template = _read("caller_prompt.jinja")
    if not own_names:
        return template
    return (
        f"{{%- set gen2embed_prompt = {own_names} -%}}\n{{%- set gen2embed_format = {{'broken_up': []}} -%}}\n"
        f"{template}{{%- set {own_names} = gen2embed_prompt -%}}\n"
    )


def with_phrase(template: str, prompt: HierarchicalPrompt, blank: str = "") -> str:
    """Return a template that writes the prompt's phrase at its end; the same one if the prompt has none.

    Args:
        template: A template that ends in what begins the assistant turn.
        prompt: The prompt.
        blank: What stands between the beginning of the turn and the phrase.
    """
    if "caller" not in prompt.texts:
        return template
    return _LAST_BREAK.sub(lambda found: f"{blank}{_PHRASE}{found[0]}", template, count=1)


def open_template(template: str) -> str:
    """Return the same without its first two lines: prompt and chat format are then variables (see `variables_of`).

    Such a template is compiled once, and renders any number of prompts and formats.
    """
    return f"{_read('header.jinja')}{_BEGINNING}{template}"


def variables_of(prompt: HierarchicalPrompt, chat_format: ChatFormat) -> dict[str, Any]:
    """Return the variables that `open_template` reads."""
    return {"gen2embed_prompt": prompt.texts, "gen2embed_format": asdict(chat_format)}


def parts_of(template: object) -> PromptedTemplate | None:
    """Take a template apart that `template_with_prompt` made; return `None` for any other template.

    Raises:
        Gen2EmbedError: Its prompt or its chat format cannot be read, or its own template is not found.
    """
    found = _GENERIC.match(_text(template))
    if not isinstance(template, str) or found is None:
        return None
    _, beginning, own = template.partition(_BEGINNING)
    if not beginning:
        raise Gen2EmbedError(
            "the chat template has a prompt of gen2embed, but not the line after which the model's own template "
            f"begins ({_BEGINNING.strip()}); export the model again"
        )
    prompt = _prompt(found[1])
    if "caller" in prompt.texts:
        own, phrase, end = own.rpartition(_PHRASE)
        if not phrase:
            raise Gen2EmbedError(
                "the chat template has a prompt with a phrase, but does not write the phrase at its end "
                f"({_PHRASE}); export the model again"
            )
        own += end
    return PromptedTemplate(own, prompt, ChatFormat.from_json(found[2]))


def prompt_of(template: object) -> HierarchicalPrompt | None:
    """Read the prompt back from a template of ours, generic or written by hand; return `None` for any other template.

    Raises:
        Gen2EmbedError: The template is ours, but its prompt cannot be read.
    """
    found = _GENERIC.match(_text(template)) or _HAND_WRITTEN.match(_text(template))
    return _prompt(found[1]) if found else None


def format_of(template: object) -> ChatFormat | None:
    """Read the chat format back from a template that `template_with_prompt` made; `None` for any other template.

    Raises:
        Gen2EmbedError: The format cannot be read.
    """
    found = _GENERIC.match(_text(template))
    return ChatFormat.from_json(found[2]) if found else None


def own_template(template: str) -> str:
    """Return a model's own template: the one below our header, or else the template as it is."""
    parts = parts_of(template)
    return template if parts is None else parts.own


def _text(template: object) -> str:
    """Return a template; an empty text for none, and for the several by name that some processors have."""
    return template if isinstance(template, str) else ""


def _prompt(text: str) -> HierarchicalPrompt:
    names = [field.name for field in fields(HierarchicalPrompt)]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Gen2EmbedError(f"prompt {text[:80]!r}: not JSON ({error}); export the model again") from error
    known = set(found) in (set(names[:6]), set(names))
    if not known or not all(isinstance(value, str) for value in found.values()):
        raise Gen2EmbedError(
            f"prompt {text[:80]!r}: not the six texts {', '.join(sorted(names[:6]))}, alone or with "
            f"{', '.join(names[6:])}; it is of another version of gen2embed: update gen2embed, or export the model "
            "again"
        )
    return HierarchicalPrompt(**found)


@cache
def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
