"""The framings: how a model is asked whether a candidate matches a query, and which words count as its answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gen2embed_mteb.embedder.chat_formats.header import parts_of, template_with_prompt
from gen2embed_mteb.embedder.families import Family, carried_by_own, chat_template
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError

NO_PROMPT = HierarchicalPrompt("", "", "", "", "", "")
"""The prompt of the generator: none. What it reads is the user's text, or the question about a pair."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What is said around a query and a candidate.

    Attributes:
        name: The name under which `framing_of` finds it.
        query: The text before the query.
        candidate: The text before the candidate; empty if the candidate is not in the question.
        question: The text at the end.
        yes: The answer that says that the candidate matches; empty if no answer is read.
        no: The answer that says that it does not.
        swapped: Whether the question is asked a second time, with the two options in the other order.
    """

    name: str
    query: str = "Query: "
    candidate: str = "\n\nCandidate: "
    question: str
    yes: str = ""
    no: str = ""
    swapped: bool = False

    @property
    def is_stock(self) -> bool:
        """Whether one forward pass of stock modules computes the score."""
        return bool(self.yes) and not self.swapped


def _options(first: str, second: str) -> str:
    return f"\n\nDoes the candidate match the query?\nA. {first}\nB. {second}\nAnswer with A or B."


_MATCHES, _DOES_NOT = "Yes, it matches completely.", "No, it matches in part, or not at all."
_MCQ = Framing(name="mcq", question=_options(_MATCHES, _DOES_NOT), yes="A", no="B")
SWAPPED = replace(_MCQ, question=_options(_DOES_NOT, _MATCHES), yes="B", no="A")
"""The second question of `mcq-both`."""

FRAMINGS = {
    framing.name: framing
    for framing in (
        _MCQ,
        replace(_MCQ, name="mcq-both", swapped=True),
        Framing(
            name="yes-no",
            question="\n\nDoes the candidate match the query completely? Answer with Yes or No.",
            yes="Yes",
            no="No",
        ),
        Framing(
            name="true-false",
            question="\n\nThe candidate matches the query completely. Answer with True or False.",
            yes="True",
            no="False",
        ),
        # The query is the whole turn: what the candidates are is said in it.
        Framing(name="likelihood", query="", candidate="", question=""),
    )
}
"""Every framing by name; `mcq` is the default."""


def framing_of(name: str) -> Framing:
    """Return a framing by name.

    Raises:
        Gen2EmbedError: No framing has that name; the message lists them.
    """
    if name not in FRAMINGS:
        close = difflib.get_close_matches(str(name), FRAMINGS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise Gen2EmbedError(f"unknown framing {name!r}.{hint} Known: {', '.join(FRAMINGS)}")
    return FRAMINGS[name]


def stock_framing(name: str) -> Framing:
    """Return a framing by name, if stock modules can express it.

    Raises:
        Gen2EmbedError: No framing has that name, or a score of it needs two forward passes.
    """
    framing = framing_of(name)
    if not framing.is_stock:
        stock = ", ".join(one.name for one in FRAMINGS.values() if one.is_stock)
        raise Gen2EmbedError(
            f"framing={name!r} cannot be saved: it needs two forward passes for a score, and no stock module makes "
            f"them; choose one of {stock}"
        )
    return framing


def plain_template(template: str, family: Family) -> str:
    """Return the template of an embedder without its prompt: what the generator reads.

    Args:
        template: The embedder's chat template.
        family: Its family.

    Raises:
        Gen2EmbedError: The template is not one that Gen2Embed wrote.
    """
    if not carried_by_own(family, template):
        return chat_template(family, NO_PROMPT)
    parts = parts_of(template)
    if parts is None:
        raise Gen2EmbedError(
            f"the chat template of this {family.name} model was not written by Gen2Embed; write the folder again: "
            "gen2embed export BASE_MODEL OUT"
        )
    return template_with_prompt(parts.own, NO_PROMPT, parts.chat_format)


def pair_template(plain: str, framing: Framing, broken_up: Sequence[str] = ()) -> str:
    """Return a chat template that asks about a pair: it reads messages of the roles "query" and "document".

    A message of the role "system" becomes the system turn. Stock processors render the template.

    Args:
        plain: What `plain_template` returns.
        framing: The question.
        broken_up: Tokens into which a space is put where a query or a candidate contains them. sentence-transformers
            6.2 renders a pair without tokenizing it first, and transformers refuses `sanitize_control_tokens` then.
    """
    texts: dict[str, Any] = {"query": framing.query, "candidate": framing.candidate, "question": framing.question}
    texts |= {"broken_up": list(broken_up)}
    # JSON strings are Jinja strings as long as non-ASCII characters stay as they are.
    return f"{{%- set gen2embed_pair = {json.dumps(texts, ensure_ascii=False)} -%}}\n{_pair()}{plain}"


@cache
def _pair() -> str:
    return (Path(__file__).parent / "pair.jinja").read_text(encoding="utf-8")
