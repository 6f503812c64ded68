"""The two-level prompt: its texts, its strategies by name, and what is appended where (paper, Sec. III-B).

A strategy is a `HierarchicalPrompt`: six texts, one per place of a conversation. `strategy` finds one by name: those of
the paper's Table IV, the axes of its Table III, and the user-level baselines it compares with.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, replace

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
    """

    query_system: str = SYSTEM
    document_system: str = SYSTEM
    query_text: str = REPRESENT_TEXT
    query_image: str = REPRESENT_IMAGE
    document_text: str = ""
    document_image: str = ""

    def __post_init__(self) -> None:
        """Refuse anything but strings, by field."""
        for field, value in asdict(self).items():
            if not isinstance(value, str):
                raise TypeError(f"HierarchicalPrompt.{field} must be a str, got {value!r}; use '' to say nothing there")

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

# E5-V introduced this pair of prompts and UniME kept it, so the two names stand for the same texts.
_ABOVE = ("\nSummary above sentence in one word: ", "\nSummary above image in one word: ")
_PROVIDED = ("\nSummarize the provided text in one word:", "\nSummarize the provided image in one word:")

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
    "e5-v": HierarchicalPrompt("", "", *_ABOVE, *_ABOVE),
    "vladva": HierarchicalPrompt("", "", *_PROVIDED, *_PROVIDED),
    **{
        "+".join(["sys" if system else "nosys", f"q:{query or 'off'}", f"d:{document or 'off'}"]): _axes(
            system, query, document
        )
        for system in (False, True)
        for query in ("", "rep", "rep-ow")
        for document in ("", "rep", "rep-ow")
    },
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
