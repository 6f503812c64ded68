"""`Pair`: an opened query with an opened candidate, and how a pair that is too long is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from gen2embed_mteb.embedder.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError


@dataclass(frozen=True)
class Pair:
    """A query and a candidate."""

    query: Content
    candidate: Content

    def as_messages(self) -> list[dict[str, Any]]:
        """Return the conversation that `pair.jinja` reads: one message per role, as sentence-transformers makes them.

        A system text of either side becomes the system turn.
        """
        system = "".join(side.system or "" for side in (self.query, self.candidate))
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for role, side in (("query", self.query), ("document", self.candidate)):
            content = replace(side, system=None).as_messages()[0]["content"]
            messages.append({"role": role, "content": content})
        return messages


def shortened(pair: Pair, excess: int, tokenizer: Any) -> Pair:
    """Return a pair whose longer text has fewer tokens.

    Args:
        pair: The pair.
        excess: How many tokens it has too many.
        tokenizer: The tokenizer of the model.

    Raises:
        Gen2EmbedError: There is no text left to cut.
    """
    counted = {name: _offsets(getattr(pair, name).text, tokenizer) for name in ("query", "candidate")}
    name = max(counted, key=lambda side: len(counted[side]))
    offsets = counted[name]
    if not offsets:
        raise Gen2EmbedError(
            f"a pair has {excess} tokens more than max_seq_length, and no text that could be cut: raise max_length, or "
            "make its images smaller"
        )
    # The two texts share what is to be cut where one alone is not much longer than the other: the next call sees to it.
    shorter = min(map(len, counted.values()))
    kept = max(len(offsets) - excess, min(shorter, len(offsets) - 1)) if shorter < len(offsets) else len(offsets) - 1
    side: Content = getattr(pair, name)
    return replace(pair, **{name: replace(side, text=side.text[: offsets[kept]])})


def _offsets(text: str, tokenizer: Any) -> list[int]:
    """Return where each token of a text begins."""
    if not text:
        return []
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(start) for start, _ in found]
