"""`Pair`: an opened query with an opened candidate, and how a pair that is too long is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError


@dataclass(frozen=True)
class Pair:
    """A query and a candidate; `None` if the question is about the query alone."""

    query: Content
    candidate: Content | None

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the conversation that `pair.jinja` reads: one message per role, as sentence-transformers makes them.

        A system text of either side becomes the system turn.
        """
        sides = [("query", self.query)] + ([] if self.candidate is None else [("document", self.candidate)])
        system = "".join(side.system or "" for _, side in sides)
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for role, side in sides:
            content = replace(side, system=None).as_messages()[0]["content"]
            messages.append({"role": role, "content": content})
        return messages


def shortened(pair: Pair, excess: int, tokenizer: Any) -> Pair:
    """Return a pair with fewer tokens of text: the longer text is cut, and both where that does not suffice.

    Args:
        pair: The pair.
        excess: How many tokens it has too many, at least 1.
        tokenizer: The tokenizer of the model.

    Raises:
        Gen2EmbedError: There is no text left to cut.
    """
    query, candidate = pair.query.text, "" if pair.candidate is None else pair.candidate.text
    starts = {"query": _starts(query, tokenizer), "candidate": _starts(candidate, tokenizer)}
    longer, shorter = sorted(starts, key=lambda name: -len(starts[name]))
    if not starts[longer]:
        raise Gen2EmbedError(
            f"a pair has {excess} tokens more than max_seq_length, and no text that could be cut: raise max_length, or "
            "make its images smaller"
        )
    left = max(len(starts[longer]) + len(starts[shorter]) - excess, 0)
    kept = {shorter: min(len(starts[shorter]), left // 2)}
    kept[longer] = left - kept[shorter]
    cut = {
        name: replace(side, text=side.text[: starts[name][kept[name]]]) if kept[name] < len(starts[name]) else side
        for name, side in (("query", pair.query), ("candidate", pair.candidate))
        if side is not None
    }
    return replace(pair, **cut)


def _starts(text: str, tokenizer: Any) -> list[int]:
    """Return where each token of a text begins."""
    if not text:
        return []
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(start) for start, _ in found]
