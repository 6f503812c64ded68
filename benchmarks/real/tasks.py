"""Eleven retrieval tasks on real texts: WordNet's meanings, and the docstrings of installed libraries.

A task has 300 queries (fewer only where too few texts exist, which is refused), and each has 100 candidates, of which
one is right; categories have 25. WordNet says which other candidates would be right as well: they are left out.

The tasks of the first half are there to choose settings on, those of the second are only reported. They share no
meaning and no library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side
from real.wordnet import CATEGORIES, Lexicon, Synset, read
from trainers.data.docstrings import MOST_WORDS, functions

T = TypeVar("T")
Half = Literal["choice", "reported"]
HALVES: tuple[Half, ...] = ("choice", "reported")
NUM_QUERIES = 300
NUM_CANDIDATES = 100
_SCIPY = ("signal", "stats", "ndimage", "optimize", "special", "sparse", "spatial", "interpolate", "linalg", "fft")
_SKLEARN = (
    *("linear_model", "cluster", "metrics", "datasets", "preprocessing", "ensemble", "decomposition"),
    *("feature_extraction", "model_selection", "neighbors", "manifold", "svm"),
)
LIBRARIES: dict[Half, tuple[str, ...]] = {
    "choice": ("numpy", "numpy.linalg", "numpy.random", *(f"scipy.{name}" for name in _SCIPY)),
    "reported": ("pandas", "networkx", *(f"sklearn.{name}" for name in _SKLEARN), "sympy"),
}


@dataclass(frozen=True)
class Task:
    """A retrieval task.

    Attributes:
        name: Its name.
        half: Whether settings may be chosen on it.
        kinds: What a query is and what a candidate is, in words.
        queries: q texts.
        documents: n texts.
        candidates: (q, k) int64, the numbers of each query's candidates; column 0 is the right one.
    """

    name: str
    half: Half
    kinds: tuple[str, str]
    queries: list[str]
    documents: list[str]
    candidates: npt.NDArray[np.int64]

    def texts(self, side: Side) -> list[str]:
        """Return the texts of a side."""
        return self.queries if side == "query" else self.documents


def make_tasks(wordnet: Path) -> list[Task]:
    """Return all tasks; the same for the same files and versions of libraries.

    Args:
        wordnet: The folder of WordNet's files.

    Raises:
        Gen2EmbedError: WordNet or the libraries give too few texts.
    """
    lexicons = {part: read(wordnet, part) for part in ("noun", "verb", "adj")}
    drawn = {part: iter(shuffled(usable(lexicon), part)) for part, lexicon in lexicons.items()}
    nouns = _take(drawn["noun"], lambda one: bool(one.category))
    verbs = _take(drawn["verb"], lambda one: bool(one.examples))
    other_verbs = _take(drawn["verb"], lambda one: True)
    adjectives = _take(drawn["adj"], lambda one: len(one.words) > 1)
    return [
        *_words_and_glosses("noun", "choice", nouns),
        _categories("choice", nouns),
        _pairs(
            "verb-example-gloss",
            "choice",
            ("sentence", "definition"),
            [one.examples[0] for one in verbs],
            list(map(_gloss, verbs)),
        ),
        *_docstrings("choice"),
        *_words_and_glosses("verb", "reported", other_verbs),
        _pairs(
            "adjective-synonym",
            "reported",
            ("word", "synonym"),
            list(map(_word, adjectives)),
            [one.words[1] for one in adjectives],
        ),
        _hypernyms("reported", drawn["noun"], lexicons["noun"].synsets),
        *_docstrings("reported"),
    ]


def digest(tasks: Iterable[Task]) -> str:
    """Return a short digest of all texts and candidates."""
    content = [[one.name, one.queries, one.documents, one.candidates.tolist()] for one in tasks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _word(one: Synset) -> str:
    return one.words[0]


def _gloss(one: Synset) -> str:
    return one.gloss


def usable(lexicon: Lexicon) -> list[Synset]:
    """Return the common meanings whose gloss is of moderate length and does not name them."""
    found = []
    for offset in lexicon.common:
        one = lexicon.synsets[offset]
        words = set(re.findall(r"[a-z]+", one.gloss.lower()))
        named = any(word in words for name in one.words for word in name.lower().split())
        if 3 <= len(one.gloss.split()) <= MOST_WORDS and not named:
            found.append(one)
    return found


def shuffled(items: Sequence[T], seed: str) -> list[T]:
    """Return items in a random order, the same one for the same seed."""
    return [items[number] for number in _chance(seed).permutation(len(items))]


def _chance(seed: str) -> np.random.Generator:
    return np.random.default_rng(list(seed.encode()))


def _take(source: Iterator[Synset], fits: Callable[[Synset], bool]) -> list[Synset]:
    """Return the next meanings that fit; no two share a word or a gloss, so no word names two of them."""
    taken: list[Synset] = []
    seen: set[str] = set()
    for one in source:
        texts = {text.lower() for text in (*one.words, one.gloss)}
        if fits(one) and not texts & seen:
            taken.append(one)
            seen |= texts
            if len(taken) == NUM_QUERIES:
                return taken
    raise Gen2EmbedError(f"WordNet gave {len(taken)} meanings where {NUM_QUERIES} are needed; use WordNet 3.0")


def _pairs(name: str, half: Half, kinds: tuple[str, str], queries: Sequence[str], documents: Sequence[str]) -> Task:
    """Make a task of pairs, of which no two have a right answer in common."""
    right = [{number} for number in range(len(documents))]
    return _with_candidates(name, half, kinds, texts=(list(queries), list(documents)), right=right)


def _with_candidates(
    name: str,
    half: Half,
    kinds: tuple[str, str],
    *,
    texts: tuple[list[str], list[str]],
    right: Sequence[set[int]],
    answers: Sequence[int] | None = None,
) -> Task:
    """Draw each query's candidates.

    Args:
        name: The task's name.
        half: Its half.
        kinds: What queries and candidates are.
        texts: q queries and n documents.
        right: For each query the numbers of all right documents; of these only the answer is a candidate.
        answers: For each query the number of its answer; by default its own number.
    """
    queries, documents = texts
    chance = _chance(name)
    rows = []
    for number, others in enumerate(right):
        answer = number if answers is None else answers[number]
        wrong = [document for document in range(len(documents)) if document not in others]
        rows.append([answer, *chance.permutation(wrong)[: NUM_CANDIDATES - 1]])
    return Task(name, half, kinds, queries, documents, np.array(rows, dtype=np.int64))


def _words_and_glosses(part: str, half: Half, synsets: Sequence[Synset]) -> list[Task]:
    words, glosses = list(map(_word, synsets)), list(map(_gloss, synsets))
    return [
        _pairs(f"{part}-gloss-word", half, ("definition", "word"), glosses, words),
        _pairs(f"{part}-word-gloss", half, ("word", "definition"), words, glosses),
    ]


def _categories(half: Half, synsets: Sequence[Synset]) -> Task:
    answers = [CATEGORIES.index(one.category) for one in synsets]
    return _with_candidates(
        "noun-gloss-category",
        half,
        ("definition", "category"),
        texts=([one.gloss for one in synsets], list(CATEGORIES)),
        right=[{answer} for answer in answers],
        answers=answers,
    )


def _hypernyms(half: Half, source: Iterator[Synset], synsets: dict[int, Synset]) -> Task:
    """Make the task that asks for the more general word; all more general ones are right, up to the top."""

    def above(one: Synset) -> set[str]:
        found: set[str] = set()
        rest = list(one.hypernyms)
        while rest:
            general = synsets[rest.pop()]
            found |= set(general.words)
            rest += general.hypernyms
        return found

    def fits(one: Synset) -> bool:
        return bool(one.hypernyms) and not set(one.words) & above(one)

    taken = _take(source, fits)
    names = [synsets[one.hypernyms[0]].words[0] for one in taken]
    documents = sorted(set(names))
    right = []
    for one in taken:
        general = above(one) | set(one.words)
        right.append({number for number, name in enumerate(documents) if name in general})
    answers = [documents.index(name) for name in names]
    return _with_candidates(
        "noun-hypernym",
        half,
        ("word", "more general word"),
        texts=(list(map(_word, taken)), documents),
        right=right,
        answers=answers,
    )


def _docstrings(half: Half) -> list[Task]:
    """Make the task from summary to details; in the reported half also the one from name to summary."""
    taken = [one for one in shuffled(functions(LIBRARIES[half]), half) if one.detail][:NUM_QUERIES]
    if len(taken) < NUM_QUERIES:
        raise Gen2EmbedError(
            f"the installed libraries gave {len(taken)} docstrings where {NUM_QUERIES} are needed; install them as "
            "constraints.txt says: make .venv/.ready"
        )
    names, summaries, details = zip(*((one.name, one.summary, one.detail) for one in taken), strict=True)
    kinds = ("summary of a function", "details of a function")
    found = [_pairs(f"docstring-detail-{half}", half, kinds, summaries, details)]
    if half == "reported":
        kinds = ("name of a function", "summary of a function")
        found.append(_pairs("code-name-summary", half, kinds, names, summaries))
    return found
