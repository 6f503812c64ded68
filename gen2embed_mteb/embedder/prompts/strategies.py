"""The two-level prompt: its texts, its strategies by name, and what is appended where (paper, Sec. III-B).

A strategy is a `HierarchicalPrompt`: texts, one per place of a conversation. `strategy` finds one by name: those of the
paper's Table IV, the axes of its Table III, the user-level baselines it compares with, and two strategies of later work
whose texts name the task, `freeret` and `lens`. Their sentences are ours, after the descriptions of those methods; the
words of a task are in `slots`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

from gen2embed_mteb.embedder.prompts.slots import DEFAULT_SLOTS, SLOTS, TaskSlots
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side

SIDES: dict[str, Side] = {
    "query": "query",
    "document": "document",
    "passage": "document",
    "corpus": "document",
    "text": "document",
    "search_query": "query",
    "search_document": "document",
    "retrieval.query": "query",
    "retrieval.passage": "document",
}
"""The side by the names that libraries and model cards give it: `prompt_name` and `task` of `encode`."""

SYSTEM = "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."
"""The system prompt (Sec. III-B, "Prompt format")."""

REPRESENT_TEXT = "\nRepresent the given text in one word."
REPRESENT_IMAGE = "\nRepresent the given text/image in one word."
"""The representation prompt for an input with an image, with or without text."""

_REPRESENT_TEXT_NO_OW = "\nRepresent the given text."
_REPRESENT_IMAGE_NO_OW = "\nRepresent the given text/image."


CallerPlace = Literal["system", "after", "phrase"]
"""The places where a prompt of the caller can be written; see `HierarchicalPrompt.caller`."""


@dataclass(frozen=True)
class HierarchicalPrompt:
    """What is said around an input, per side. An empty text means: nothing there, not even an empty turn.

    Attributes:
        query_system: the system turn of queries.
        document_system: the system turn of candidates, and of inputs encoded without a side.
        query_text: appended to the user turn of a text-only query.
        query_image: appended to the user turn of a query with an image.
        document_text: appended to the user turn of a text-only candidate.
        document_image: appended to the user turn of a candidate with an image.
        query_phrase: what the assistant turn of a query begins with, so that the model reads it last.
        document_phrase: the same for candidates.
        caller: where a prompt of the caller is written (`prompt=` of `encode`, or a system message): in the `system`
            turn; `after` the content, in place of all other texts; or as a `phrase`: its last line begins the
            assistant turn, and what stands before that line is the system turn (one line alone is the system turn).
    """

    query_system: str = SYSTEM
    document_system: str = SYSTEM
    query_text: str = REPRESENT_TEXT
    query_image: str = REPRESENT_IMAGE
    document_text: str = ""
    document_image: str = ""
    query_phrase: str = ""
    document_phrase: str = ""
    caller: CallerPlace = "system"

    def __post_init__(self) -> None:
        """Refuse anything but strings, by field, and an unknown place."""
        for field, value in asdict(self).items():
            if not isinstance(value, str):
                raise TypeError(f"HierarchicalPrompt.{field} must be a str, got {value!r}; use '' to say nothing there")
        if self.caller not in get_args(CallerPlace):
            raise Gen2EmbedError(
                f"HierarchicalPrompt.caller is {self.caller!r}; known: {', '.join(get_args(CallerPlace))}"
            )
        for phrase in (self.query_phrase, self.document_phrase):
            if phrase != phrase.strip() or "\n" in phrase:
                raise Gen2EmbedError(
                    f"HierarchicalPrompt: the phrase {phrase!r} must be one line, without blanks around it"
                )

    @property
    def name(self) -> str:
        """The name under which `strategy` finds this prompt, or "custom"."""
        return next((name for name, prompt in STRATEGIES.items() if prompt == self), "custom")

    def system(self, side: Side | None) -> str:
        """Return the system prompt of a side; `None` counts as a candidate."""
        return self.query_system if side == "query" else self.document_system

    def suffix(self, side: Side | None, has_image: bool) -> str:
        """Return what is appended to the user turn of a side; `None` counts as a candidate."""
        if side == "query":
            return self.query_image if has_image else self.query_text
        return self.document_image if has_image else self.document_text

    def phrase(self, side: Side | None) -> str:
        """Return what the assistant turn of a side begins with; `None` counts as a candidate."""
        return self.query_phrase if side == "query" else self.document_phrase

    @property
    def texts(self) -> dict[str, str]:
        """The fields by name, as they are written into a template: the first six, and the others if they say a thing.

        So the templates of prompts without a phrase are those of earlier versions, to the byte.
        """
        said = asdict(self)
        plain = said["caller"] == "system" and not self.query_phrase and not self.document_phrase
        return {name: said[name] for name in list(said)[:6]} if plain else said

    def with_caller(self, text: str | None) -> HierarchicalPrompt:
        """Return the prompt that is rendered if a caller passes one; `None` stands for no prompt of a caller.

        Args:
            text: The caller's prompt.
        """
        if text is None:
            return self
        if self.caller == "after":
            after = f"\n{text}" if text else ""
            return HierarchicalPrompt(
                *("", "", after, after, after, after, self.query_phrase, self.document_phrase), caller=self.caller
            )
        if self.caller == "phrase":
            system, _, phrase = text.strip(" \n").rpartition("\n")
            if system:
                phrase = phrase.strip()
                return replace(
                    self, query_system=system, document_system=system, query_phrase=phrase, document_phrase=phrase
                )
            text = phrase
        return replace(self, query_system=text, document_system=text)


def _axes(system: bool, query: str, document: str) -> HierarchicalPrompt:
    """Return a row of Table III: the system prompt on or off, and per side no representation prompt, one, or one with
    OW.
    """
    texts = {
        "": ("", ""),
        "rep": (_REPRESENT_TEXT_NO_OW, _REPRESENT_IMAGE_NO_OW),
        "rep-ow": (REPRESENT_TEXT, REPRESENT_IMAGE),
    }
    stated = SYSTEM if system else ""
    return HierarchicalPrompt(stated, stated, *texts[query], *texts[document])


_NONE = HierarchicalPrompt("", "", "", "")
_SYSTEM = HierarchicalPrompt(query_text="", query_image="")
_HIERARCHICAL = HierarchicalPrompt()
_D_REIN = replace(_SYSTEM, document_text=REPRESENT_TEXT, document_image=REPRESENT_IMAGE)
_QD_REIN = replace(_HIERARCHICAL, document_text=REPRESENT_TEXT, document_image=REPRESENT_IMAGE)

# E5-V introduced this pair of prompts and UniME kept it. UniME's scripts write it without the blank at the end; the
# quick start of its README has the blank.
_ABOVE = ("\nSummary above sentence in one word:", "\nSummary above image in one word:")
_ABOVE_BLANK = (f"{_ABOVE[0]} ", f"{_ABOVE[1]} ")
_PROVIDED = ("\nSummarize the provided text in one word:", "\nSummarize the provided image in one word:")

_FREERET = (
    "\nAbove is {own}. It will be compared with {other} by {aspect}.\n"
    "Say in one word what it means, with {aspect} before all else.\n"
    "The word must have a meaning of its own: no article, no preposition, no symbol."
)
_LENS = (
    "You will be given {own}, which will be compared with {other}. Attend to one thing in it: {aspect}. "
    'Your answer sums that up, and begins with "{phrase}"'
)
_LENS_PHRASE = "{aspect} in one word:"


def task_prompt(name: str, slots: TaskSlots) -> HierarchicalPrompt:
    """Return a strategy whose texts name a task.

    - `freeret` (after arXiv 2509.24621) says nothing before the content. Behind it, one sentence tells what will be
      compared with what, one asks for one word and names the aspect, and one rules out words that say nothing.
    - `lens` (after arXiv 2609.20252) tells the aspect before the content, with a phrase; the same phrase begins the
      assistant turn, so that its tokens are read last.

    Candidates get the same sentences with query and target exchanged.

    Args:
        name: `freeret` or `lens`.
        slots: The words of the task. Braces and quotes in them are written as they are.

    Raises:
        Gen2EmbedError: There is no such strategy.
    """
    if name not in TASK_STRATEGIES:
        raise Gen2EmbedError(f"{name!r} has no slots for a task; strategies that have: {', '.join(TASK_STRATEGIES)}")
    if name == "freeret":
        query, document = (_filled(_FREERET, slots, side) for side in ("query", "document"))
        return HierarchicalPrompt("", "", query, query, document, document, caller="after")
    phrase = _filled(_LENS_PHRASE, slots, "query")
    phrase = phrase[:1].upper() + phrase[1:]
    query, document = (_filled(_LENS, slots, side, phrase) for side in ("query", "document"))
    return HierarchicalPrompt(query, document, "", "", "", "", phrase, phrase, caller="phrase")


def _filled(text: str, slots: TaskSlots, side: str, phrase: str = "") -> str:
    """Return a text with the words of a task, all put in at once: a word is not searched for the names of slots."""
    own, other = (slots.query, slots.target) if side == "query" else (slots.target, slots.query)
    words = {"own": own, "other": other, "aspect": slots.aspect, "phrase": phrase}
    return _SLOT.sub(lambda found: words[found[1]], text)


def prompts_of_datasets(prompt: HierarchicalPrompt) -> dict[str, str]:
    """Return the prompts that every known dataset has under a strategy, by `dataset_prompt_name`.

    Each is what a caller passes as `prompt` to get the texts of that dataset.

    Args:
        prompt: The strategy; any but `freeret` and `lens` with the default slots have none.
    """
    if prompt.name not in TASK_STRATEGIES:
        return {}
    found = {}
    for dataset, slots in SLOTS.items():
        made = task_prompt(prompt.name, slots)
        for side in _BOTH:
            text = made.suffix(side, False).removeprefix("\n")
            if made.caller == "phrase":
                text = f"{made.system(side)}\n{made.phrase(side)}"
            found[dataset_prompt_name(dataset, side)] = text
    return found


def dataset_prompt_name(dataset: str, side: Side) -> str:
    """Return the name that a dataset's prompt has in `SentenceTransformer.prompts`, such as "N24News:query"."""
    return f"{dataset}:{side}"


_SLOT = re.compile(r"\{(own|other|aspect|phrase)\}")
_BOTH: tuple[Side, Side] = ("query", "document")

TASK_STRATEGIES = ("freeret", "lens")
"""The strategies whose texts name the task."""

TABLE_IV = ("none", "system-q", "system-d", "system", "qd-rein", "d-rein", "hierarchical")
"""The strategies of the paper's Table IV, in its order of rows."""

STRATEGIES: dict[str, HierarchicalPrompt] = {
    "none": _NONE,
    "system-q": replace(_NONE, query_system=SYSTEM),
    "system-d": replace(_NONE, document_system=SYSTEM),
    "system": _SYSTEM,
    "hierarchical": _HIERARCHICAL,
    "d-rein": _D_REIN,
    "qd-rein": _QD_REIN,
    "unime": HierarchicalPrompt("", "", *_ABOVE, *_ABOVE),
    "e5-v": HierarchicalPrompt("", "", *_ABOVE_BLANK, *_ABOVE_BLANK),
    "unime-readme": HierarchicalPrompt("", "", *_ABOVE_BLANK, *_ABOVE_BLANK),
    "vladva": HierarchicalPrompt("", "", *_PROVIDED, *_PROVIDED),
    **{
        "+".join(["sys" if system else "nosys", f"q:{query or 'off'}", f"d:{document or 'off'}"]): _axes(
            system, query, document
        )
        for system in (False, True)
        for query in ("", "rep", "rep-ow")
        for document in ("", "rep", "rep-ow")
    },
    **{name: task_prompt(name, DEFAULT_SLOTS) for name in TASK_STRATEGIES},
}
"""Every strategy by name. `sys+q:rep-ow+d:off` and the like are the axes of Table III; `rep-ow` says "in one word"."""

DEFAULT = "hierarchical"


def side_of(name: object, argument: str) -> Side | None:
    """Return the side that a name stands for, in any case; `None` for `None`.

    Args:
        name: what the caller passed.
        argument: under which name, for the message.

    Raises:
        Gen2EmbedError: no side has that name; the message lists them.
    """
    if name is None:
        return None
    side = SIDES.get(name.lower()) if isinstance(name, str) else None
    if side is None:
        raise Gen2EmbedError(f"unknown {argument} {name!r}; known: {', '.join(SIDES)}")
    return side


def strategy(prompt_mode: str | HierarchicalPrompt) -> HierarchicalPrompt:
    """Find a strategy by name; a `HierarchicalPrompt` with texts of one's own passes through.

    Args:
        prompt_mode: a name in `STRATEGIES`, in any case, `_` for `-` accepted; or a prompt.

    Raises:
        ValueError: no strategy has that name; the message lists them.
    """
    if isinstance(prompt_mode, HierarchicalPrompt):
        return prompt_mode
    wanted = str(prompt_mode).lower().replace("_", "-")
    if wanted not in STRATEGIES:
        close = difflib.get_close_matches(wanted, STRATEGIES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise Gen2EmbedError(
            f"unknown prompt_mode {prompt_mode!r}.{hint} Known: {', '.join(STRATEGIES)}. "
            "For texts of your own pass a gen2embed_mteb.HierarchicalPrompt."
        )
    return STRATEGIES[wanted]
