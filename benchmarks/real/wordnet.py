"""Reads WordNet's data files: synsets with their words, glosses, examples, categories and hypernyms."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError

PARTS = ("noun", "verb", "adj", "adv")
CATEGORIES = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
"""WordNet's categories of nouns: its lexicographer files 4 to 28."""
_FIRST_CATEGORY = 4


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        words: Its words; all of them are right names of it.
        gloss: Its definition, without examples.
        examples: Sentences or phrases in which one of its words is used.
        category: For nouns one of `CATEGORIES`; otherwise empty.
        hypernyms: Offsets of the more general synsets.
    """

    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    category: str
    hypernyms: tuple[int, ...]


@dataclass(frozen=True)
class Lexicon:
    """The synsets of one part of speech.

    Attributes:
        synsets: By their offset.
        common: Offsets of the first meanings of words that WordNet's tagged texts use, sorted; the first word of each
            is such a word.
    """

    synsets: dict[int, Synset]
    common: list[int]


def read(folder: Path, part: str) -> Lexicon:
    """Read the synsets of one part of speech.

    Args:
        folder: The folder of `data.noun`, `index.noun`, and so on.
        part: One of `PARTS`.

    Raises:
        Gen2EmbedError: A file is missing.
    """
    data, index = folder / f"data.{part}", folder / f"index.{part}"
    for path in (data, index):
        if not path.is_file():
            raise Gen2EmbedError(f"{path} is missing: this is no folder of WordNet (Debian: wordnet-base)")
    synsets = {}
    for line in data.read_text("utf-8").splitlines():
        if not line.startswith(" "):
            offset, synset = _synset(line)
            synsets[offset] = synset
    first = {}
    for line in index.read_text("utf-8").splitlines():
        cells = line.split()
        if not line.startswith(" ") and int(cells[-int(cells[2]) - 1]) > 0:  # how many meanings were tagged
            first[_plain(cells[0])] = int(cells[-int(cells[2])])
    common = sorted({offset for word, offset in first.items() if synsets[offset].words[0].lower() == word})
    return Lexicon(synsets, common)


def _synset(line: str) -> tuple[int, Synset]:
    facts, _, gloss = line.partition(" | ")
    cells = facts.split()
    num_words = int(cells[3], 16)
    words = tuple(_plain(word) for word in cells[4 : 4 + 2 * num_words : 2])
    place = 4 + 2 * num_words
    pointers = [cells[place + 1 + 4 * i : place + 5 + 4 * i] for i in range(int(cells[place]))]
    parts = [part.strip() for part in gloss.strip().split(";") if part.strip()]
    definition = "; ".join(part for part in parts if not part.startswith('"'))
    examples = tuple(part.strip('"') for part in parts if part.startswith('"') and part.endswith('"'))
    number = int(cells[1])
    category = CATEGORIES[number - _FIRST_CATEGORY] if 4 <= number <= 28 else ""
    hypernyms = tuple(int(offset) for kind, offset, *_ in pointers if kind == "@")
    return int(cells[0]), Synset(words, definition, examples, category, hypernyms)


def _plain(word: str) -> str:
    """Return a word without the mark of an adjective's place, such as `(a)`, and with blanks."""
    return word.partition("(")[0].replace("_", " ")
