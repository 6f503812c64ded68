"""Finding the chat format of a model by trying: no table of models is needed.

1. Eight candidates: the system text as parts, as a string, or folded into the user turn with one of two joiners; the
   user's turn as parts or as a string.
2. Each is rendered for six conversations on both sides (`rules`). The first that breaks no rule is taken.
3. Then every switch that changes no rendering is dropped.

Cost: about sixty renderings of one compiled template, whose lines are counted (`limits`): 110 to 200 ms, once for each
template in a process. An exported model is not probed: its format is read from its template, which is rendered once, to
see that it still can be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from gen2embed_mteb.embedder.chat_formats.chat_format import JOINERS, ChatFormat
from gen2embed_mteb.embedder.chat_formats.header import open_template, variables_of
from gen2embed_mteb.embedder.chat_formats.limits import TemplateLimitError, check_length, limited_lines
from gen2embed_mteb.embedder.chat_formats.rules import (
    CONVERSATIONS,
    FIRST,
    NO_PROMPT,
    PROMPT,
    REPRESENT,
    SIDES,
    TEXT,
    Conversation,
    Renderings,
    broken_rules,
    keeps_marks,
)
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.names import Side

DETECTION_VERSION = 1
"""Changes whenever the same template is given another format than before."""
_KEPT = 64
"""Of how many templates the format is kept, for models that are loaded again."""


class Detected(NamedTuple):
    """A chat format, and why it is this one, in plain sentences."""

    chat_format: ChatFormat
    reasons: tuple[str, ...]


def candidates(image: str) -> list[ChatFormat]:
    """Return the eight candidates, in the order in which they are tried, with all switches on.

    Args:
        image: The text that stands for an image where the user's turn is a string.
    """
    systems: list[dict[str, Any]] = [{"system": "parts"}, {"system": "string"}]
    systems += [{"system": "folded", "joiner": joiner} for joiner in JOINERS]
    users: list[dict[str, Any]] = [{"user": "parts"}, {"user": "string", "image": image}]
    return [ChatFormat(**system, **user, no_thinking=True, pin_date=True) for user, system in product(users, systems)]


def detect(
    template: str, variables: Mapping[str, Any] | None = None, *, images: bool = True, image: str = ""
) -> Detected:
    """Return the chat format of a model's own template.

    Args:
        template: The template.
        variables: What else it can read: the tokenizer's special tokens, by name (`bos_token`, …).
        images: Whether the model takes images; without them, conversations with images are left out.
        image: The processor's placeholder of an image, for templates that take a string alone.

    Raises:
        Gen2EmbedError: No candidate keeps all rules; the message names the rules that each one breaks. Or the template
            runs or writes more than is allowed (see `limits`).
    """
    return _detect(template, json.dumps(dict(variables or {}), default=str), images, image)


@lru_cache(maxsize=_KEPT)
def _detect(template: str, given: str, images: bool, image: str) -> Detected:
    variables = json.loads(given)
    conversations = [one for one in CONVERSATIONS if images or not one.images]
    failed: dict[str, str] = {}
    for candidate in candidates(image):
        rendered, faults = _tried(template, candidate, conversations, variables)
        if not faults and not keeps_marks(rendered):
            candidate = replace(candidate, images_first=True)  # noqa: PLW2901 # the same one, completed
            rendered, faults = _tried(template, candidate, conversations, variables)
        if not faults:
            found = _without_idle_switches(template, candidate, conversations, variables)
            return Detected(found, tuple(_reasons(found, failed, template, rendered, variables)))
        failed[_named(candidate)] = "; ".join(faults[:3])
    raise Gen2EmbedError(
        "no chat format fits the model's chat template. "
        + ". ".join(f"{name[0].upper()}{name[1:]}: {faults}" for name, faults in failed.items())
        + ". Pass a template of your own: processor_kwargs={'chat_template': …}"
    )


def render(
    template: str, messages: list[dict[str, Any]], side: Side | None = None, variables: Mapping[str, Any] | None = None
) -> str:
    """Render one conversation as transformers does, without a processor.

    Args:
        template: A chat template.
        messages: The conversation.
        side: The side, which the template reads as `task`.
        variables: What else the template can read.

    Raises:
        Gen2EmbedError: The template runs or writes more than is allowed (see `limits`).
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {**(variables or {}), **({} if side is None else {"task": side})}
    with limited_lines():
        rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **given)
    check_length(rendered[0])
    return str(rendered[0])


def _tried(
    template: str, chat_format: ChatFormat, conversations: list[Conversation], variables: Mapping[str, Any]
) -> tuple[Renderings, list[str]]:
    """Return the renderings in one format, and what is wrong with them."""
    try:
        rendered = _rendered(template, chat_format, PROMPT, conversations, variables)
        plain = _rendered(template, chat_format, NO_PROMPT, [TEXT], variables)
    except TemplateLimitError:  # another format would take as long
        raise
    except Exception as error:  # whatever it raises follows from the template
        return {}, [f"the template raises {type(error).__name__}: {one_line(error)[:200]}"]
    faults = broken_rules(rendered, {side: text for (_, side), text in plain.items()})
    if not faults and _rendered(template, chat_format, PROMPT, conversations, variables) != rendered:
        faults.append(
            "the template writes another text each time for the same conversation, so that vectors would change"
        )
    return rendered, faults


def _rendered(
    template: str,
    chat_format: ChatFormat,
    prompt: HierarchicalPrompt,
    conversations: list[Conversation],
    variables: Mapping[str, Any],
) -> Renderings:
    given = {**variables, **variables_of(prompt, chat_format)}
    ours = open_template(template)
    return {(one, side): render(ours, one.messages, side, given) for one in conversations for side in SIDES}


def _without_idle_switches(
    template: str, chat_format: ChatFormat, conversations: list[Conversation], variables: Mapping[str, Any]
) -> ChatFormat:
    """Return the format with every switch off that changes no rendering, with a prompt or without."""

    def all_of(one: ChatFormat) -> Any:
        try:
            return [_rendered(template, one, prompt, conversations, variables) for prompt in (PROMPT, NO_PROMPT)]
        except Exception:  # without this switch the template raises
            return None

    wanted = all_of(chat_format)
    if all_of(without := replace(chat_format, no_thinking=False)) == wanted:
        chat_format = without
    if all_of(without := replace(chat_format, pin_date=False)) == wanted:
        chat_format = without
    return chat_format


def _named(chat_format: ChatFormat) -> str:
    system = {
        "parts": "the system text as a list of parts",
        "string": "the system text as a string",
        "folded": f"the system text at the beginning of the user's turn, followed by {chat_format.joiner!r}",
    }[chat_format.system]
    return f"{system}, the user's turn as {'a list of parts' if chat_format.user == 'parts' else 'a string'}"


def _reasons(
    found: ChatFormat, failed: dict[str, str], template: str, rendered: Renderings, variables: Mapping[str, Any]
) -> list[str]:
    reasons = [f"Not {name}: {faults}." for name, faults in failed.items()]
    reasons.append(f"The template gets {_named(found)}: no rule is broken.")
    if found.no_thinking:
        reasons.append("enable_thinking is false: otherwise the answer would begin with a reasoning.")
    if found.pin_date:
        reasons.append("The template writes today's date; it is pinned to 26 July 2024, so that vectors stay the same.")
    if found.images_first:
        reasons.append("The template moves images out of the text: MMEB's marks <|image_1|> in the text are lost.")
    spaced = CONVERSATIONS[1]
    if f"{FIRST}\n\n{REPRESENT}" not in rendered[spaced, "query"] or f"{FIRST}\n" not in rendered[spaced, "document"]:
        reasons.append("The template trims texts: blanks and line breaks at the beginning and end of a turn are lost.")
    own = unprompted_text(template, found, variables)
    if own:
        reasons.append(f"Without a system text the template says by itself: {own!r}.")
    return reasons


def unprompted_text(template: str, chat_format: ChatFormat, variables: Mapping[str, Any] | None = None) -> str:
    """Return what the template says by itself where no system text is given, beyond what it writes around one.

    Args:
        template: The model's own template.
        chat_format: Its chat format.
        variables: What else it can read.

    Returns:
        An empty text if the beginning without a system text is that of the prompt's without the system turn.
    """
    given = variables or {}
    plain = _rendered(template, chat_format, NO_PROMPT, [TEXT], given)[TEXT, "document"].partition(FIRST)[0]
    said = _rendered(template, chat_format, PROMPT, [TEXT], given)[TEXT, "document"].partition(FIRST)[0]
    start = 0
    while start < min(len(plain), len(said)) and plain[start] == said[start]:
        start += 1
    end = 0
    while end < min(len(plain), len(said)) - start and plain[-1 - end] == said[-1 - end]:
        end += 1
    return plain[start : len(plain) - end].strip()
