"""The rules that a rendered prompt must keep, and the conversations on which they are checked.

Every text of the prompt and of the user is a word that occurs nowhere else (a sentinel), so that a rendering tells
where the template put it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.names import Side

SYSTEM, REPRESENT = "zqsystemqz", "zqrepresentqz"
FIRST, SECOND, THIRD = "zqfirstqz", "zqsecondqz", "zqthirdqz"
PROMPT = HierarchicalPrompt(SYSTEM, SYSTEM, f"\n{REPRESENT}", f"\n{REPRESENT}", "", "")
NO_PROMPT = HierarchicalPrompt("", "", "", "", "", "")
SIDES: tuple[Side, ...] = ("query", "document")

# What begins or ends a reasoning: `<think>`, `</think>`, `[THINK]`, …
_THINKING = re.compile(r"[<\[](?P<end>/?)(?:[\w:]*think\w*|thought|reasoning)[>\]]", re.IGNORECASE)
# What printing a Python list of parts, or one of its parts, leaves in a text.
_REPR = re.compile(r"\[\{|'type': ?'|'text': ?'")


@dataclass(frozen=True)
class Conversation:
    """An input: its pieces of text, which MMEB's marks separate, and the number of its images."""

    name: str
    pieces: tuple[str, ...]
    images: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as `Content.as_messages` writes it."""
        text = self.pieces[0] if self.pieces else ""
        for number, piece in enumerate(self.pieces[1:], start=1):
            text += f"<|image_{number}|>{piece}"
        parts: list[dict[str, Any]] = [{"type": "image"}] * self.images
        return [{"role": "user", "content": parts + ([{"type": "text", "text": text}] if text else [])}]


TEXT = Conversation("a text", (FIRST,), 0)
ONE_IMAGE = Conversation("an image and a text", (FIRST,), 1)
TWO_IMAGES = Conversation("two images and a text", (FIRST,), 2)
MARKED = Conversation("a text with two marked images", (FIRST, SECOND, THIRD), 2)
CONVERSATIONS = (
    TEXT,
    Conversation("a text that ends in a line break", (f"{FIRST}\n",), 0),
    Conversation("an image", (), 1),
    ONE_IMAGE,
    TWO_IMAGES,
    MARKED,
)

Renderings = dict[tuple[Conversation, Side], str]


def broken_rules(rendered: Renderings, unprompted: dict[Side, str]) -> list[str]:
    """Return what is wrong with the renderings of one chat format, in plain words; an empty list if nothing is.

    Args:
        rendered: The renderings of the conversations under `PROMPT`.
        unprompted: Those of `TEXT` under `NO_PROMPT`.
    """
    ending = ending_of(rendered)
    faults = []
    marker = placeholder(rendered)
    for (conversation, side), text in rendered.items():
        where = f"({side}, {conversation.name})"
        faults += [f"{fault} {where}" for fault in _faults(conversation, side, text, ending, marker)]
    for side, text in unprompted.items():
        if text.count(FIRST) != 1 or not text.endswith(ending.lstrip()):
            faults.append(f"without a prompt, the user's text is not there once, or the ending is another ({side})")
    return list(dict.fromkeys(faults))


def ending_of(rendered: Renderings) -> str:
    """Return what stands behind the representation prompt of a text-only query; an empty text if that is missing."""
    text = rendered[TEXT, "query"]
    return text.rpartition(REPRESENT)[2] if REPRESENT in text else ""


def placeholder(rendered: Renderings) -> str:
    """Return what the template writes for an image; an empty text if nothing is as often there as there are images.

    It is what a second image adds, or else what the first one adds: some templates write `Image 1`, `Image 2` before
    the placeholders where there are several. Numbers in it count as 0.
    """
    texts = [(_unnumbered(text), conversation.images) for (conversation, _), text in rendered.items()]
    none, one, two = (_unnumbered(rendered.get((which, "query"), "")) for which in (TEXT, ONE_IMAGE, TWO_IMAGES))
    for added in (_added(one, two), _added(none, one)):
        # It may begin a few characters earlier, in what both have in common: `img><` is found for `<img>` before a `<`.
        for shift in range(len(added)):
            turned = (added[len(added) - shift :] + added[: len(added) - shift]).strip()
            if turned and all(text.count(turned) == images for text, images in texts):
                return turned
    return ""


def _added(short: str, long: str) -> str:
    """Return what a longer text has from where it differs from a shorter one, as long as what is added."""
    start = 0
    while start < min(len(short), len(long)) and short[start] == long[start]:
        start += 1
    return long[start : start + max(len(long) - len(short), 0)]


def _unnumbered(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def keeps_marks(rendered: Renderings) -> bool:
    """Return whether images stand where the text marks them."""
    if (MARKED, "query") not in rendered:
        return True
    text, marker = _unnumbered(rendered[MARKED, "query"]), placeholder(rendered)
    between = text[text.find(FIRST) : text.find(SECOND)], text[text.find(SECOND) : text.find(THIRD)]
    return bool(marker) and all(marker in piece for piece in between)


def _faults(conversation: Conversation, side: Side, text: str, ending: str, marker: str) -> list[str]:
    faults = []
    if _REPR.search(text):
        faults.append("a Python list is printed")
    if text.count(SYSTEM) != 1:
        faults.append(f"the system text is there {text.count(SYSTEM)} times")
    pieces = [piece.strip() for piece in conversation.pieces]
    if any(text.count(piece) != 1 for piece in pieces):
        faults.append("the user's text is not there once")
    wanted = [SYSTEM, *pieces, *([REPRESENT] if side == "query" else [])]
    places = [text.find(word) for word in wanted]
    if text.count(REPRESENT) != (side == "query"):
        faults.append(f"the representation prompt is there {text.count(REPRESENT)} times")
    elif places != sorted(places):
        faults.append("system text, user's text and representation prompt are not in this order")
    elif side == "query" and pieces and text[places[-2] + len(pieces[-1]) : places[-1]].strip():
        faults.append("something stands between the user's text and the representation prompt")
    if conversation.images and not marker:
        faults.append(f"there are not {conversation.images} placeholders of images")
    faults += _ending_faults(text, ending)
    return faults


def _ending_faults(text: str, ending: str) -> list[str]:
    if not ending.strip():
        return ["nothing stands behind the user's turn that begins the answer"]
    if not text.endswith(ending.lstrip()):
        return ["the ending is another"]
    thinking = list(_THINKING.finditer(ending))
    if thinking and not thinking[-1]["end"]:
        return [f"the answer begins with an open {thinking[-1][0]}"]
    return []
