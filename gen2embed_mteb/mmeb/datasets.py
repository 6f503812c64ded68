"""The 36 datasets of MMEB, and the records that describe a benchmark of this form.

Source: paper, Table I (names, meta-tasks, training sizes) and Section IV-A (in- and out-of-domain). To evaluate on
another benchmark of this form, such as MMEB-mini, define another `Benchmark`; no other code of the evaluation contains
names of datasets.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gen2embed_mteb.errors import Gen2EmbedError

META_TASKS = ("Classification", "VQA", "Retrieval", "Grounding")

Form = Literal["label", "question", "text-to-image", "dialogue-to-image", "image-to-image"]
"""The way in which the V2 columns are joined into one text; see `row_text.py`."""


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of a benchmark.

    Attributes:
        name: Its name in the evaluation data and in every report.
        meta_task: One of `META_TASKS`.
        in_domain: Whether its training split is part of the training data.
        form: How the V2 columns are joined.
        train_name: Its name in the training data if that differs, as `ImageNet_1K` does; otherwise empty.
        train_pairs: The number of training pairs as the paper's Table I rounds it; 0 if there are none.
        candidates_as_queries: Whether candidates are encoded on the query side. This is so for RefCOCO-Matching: its
            candidates have instructions like queries, and the official code treats them as queries.
    """

    name: str
    meta_task: str
    in_domain: bool
    form: Form
    train_name: str = ""
    train_pairs: int = 0
    candidates_as_queries: bool = False

    def __post_init__(self) -> None:
        """Check the meta-task, by which averages are grouped.

        Raises:
            ValueError: The meta-task is unknown.
        """
        if self.meta_task not in META_TASKS:
            raise Gen2EmbedError(f"{self.name}: unknown meta-task {self.meta_task!r}; known: {', '.join(META_TASKS)}")

    @property
    def folders(self) -> tuple[str, ...]:
        """The possible names of the folder with its files, the more likely first."""
        return (self.name, self.train_name) if self.train_name else (self.name,)


@dataclass(frozen=True)
class Benchmark:
    """A named list of datasets in MMEB's form.

    Attributes:
        name: The name on the command line and in `results.json`.
        title: The name in tables.
        datasets: The datasets in the order in which they are run and reported.
    """

    name: str
    title: str
    datasets: tuple[DatasetInfo, ...]

    def __post_init__(self) -> None:
        """Check that names are distinct.

        Raises:
            ValueError: Two datasets share a name.
        """
        names = self.names
        if len(set(names)) != len(names):
            raise Gen2EmbedError(f"benchmark {self.name!r} lists a dataset twice: {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its datasets, in order."""
        return tuple(dataset.name for dataset in self.datasets)

    @property
    def meta_tasks(self) -> tuple[str, ...]:
        """The meta-tasks of its datasets, in the order of the paper's tables."""
        present = {dataset.meta_task for dataset in self.datasets}
        return tuple(task for task in META_TASKS if task in present)

    def select(self, subsets: Sequence[str] = (), meta_tasks: Sequence[str] = ()) -> Benchmark:
        """Return a benchmark with some of the datasets, in the same order.

        Args:
            subsets: Names of datasets in the spelling of evaluation or training data, in any case; empty for all.
            meta_tasks: Names of meta-tasks or their beginnings (`cla`), in any case; empty for all.

        Returns:
            A benchmark of the same name with the datasets that match both.

        Raises:
            ValueError: A name is unknown (the message lists the known ones), or no dataset matches both.
        """
        aliases = {folder: dataset.name for dataset in self.datasets for folder in dataset.folders}
        names = {lookup(name, aliases, "dataset", self.names) for name in subsets} or set(self.names)
        known = {task: task for task in self.meta_tasks}
        tasks = {lookup(task, known, "meta-task", self.meta_tasks) for task in meta_tasks} or set(self.meta_tasks)
        chosen = tuple(item for item in self.datasets if item.name in names and item.meta_task in tasks)
        if not chosen:
            raise Gen2EmbedError(
                f"no dataset of {self.title} is both in --subsets {' '.join(subsets)} and in "
                f"--meta_task {' '.join(meta_tasks)}; drop one of the two"
            )
        return Benchmark(self.name, self.title, chosen)


def lookup(name: str, known: Mapping[str, str], kind: str, listed: Iterable[str]) -> str:
    """Find the name that a user typed: with the exact spelling, or in any case if only one name fits.

    Args:
        name: The name that the user typed.
        known: The name for each known spelling; several spellings may stand for one name.
        kind: The kind of name, for the message.
        listed: The names to list in the message.

    Raises:
        Gen2EmbedError: The name is unknown, or it fits several names that differ only in case.
    """
    meant = matches(name, known)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise Gen2EmbedError(f"{kind} {name!r} can mean {' or '.join(meant)}; write the one you mean exactly")
    lowered = _folded(name)
    # Only the few meta-tasks may be abbreviated: among datasets, `MSCOCO` is the beginning of three names.
    starts = [full for key, full in known.items() if lowered and _folded(key).startswith(lowered)]
    if kind == "meta-task" and len(starts) == 1:
        return starts[0]
    close = difflib.get_close_matches(lowered, {_folded(key): key for key in known}, n=1)
    full = next((full for key, full in known.items() if close and _folded(key) == close[0]), "")
    hint = f"; did you mean {full!r}?" if full else ""
    raise Gen2EmbedError(f"unknown {kind} {name!r}{hint} Known: {', '.join(listed)}")


def matches(name: str, known: Mapping[str, str]) -> list[str]:
    """Return the names that a typed name can mean: the one with this spelling, or else all that differ only in case.

    Args:
        name: The name that the user typed.
        known: The name for each known spelling.
    """
    for typed in (name, name.strip()):
        if typed in known:
            return [known[typed]]
    lowered = _folded(name)
    return list(dict.fromkeys(full for key, full in known.items() if _folded(key) == lowered))


def _folded(name: str) -> str:
    # File systems differ in how they compose accents.
    return unicodedata.normalize("NFC", name.strip()).casefold()


def _ind(name: str, meta_task: str, form: Form, thousands: int, train_name: str = "") -> DatasetInfo:
    return DatasetInfo(name, meta_task, True, form, train_name=train_name, train_pairs=thousands * 1000)


def _ood(name: str, meta_task: str, form: Form, *, candidates_as_queries: bool = False) -> DatasetInfo:
    return DatasetInfo(name, meta_task, False, form, candidates_as_queries=candidates_as_queries)


MMEB = Benchmark(
    "mmeb",
    "MMEB",
    (
        _ind("ImageNet-1K", "Classification", "label", 100, "ImageNet_1K"),
        _ind("N24News", "Classification", "label", 49),
        _ind("HatefulMemes", "Classification", "label", 8),
        _ind("VOC2007", "Classification", "label", 8),
        _ind("SUN397", "Classification", "label", 20),
        _ood("Place365", "Classification", "label"),
        _ood("ImageNet-A", "Classification", "label"),
        _ood("ImageNet-R", "Classification", "label"),
        _ood("ObjectNet", "Classification", "label"),
        _ood("Country211", "Classification", "label"),
        _ind("OK-VQA", "VQA", "question", 9),
        _ind("A-OKVQA", "VQA", "question", 17),
        _ind("DocVQA", "VQA", "question", 40),
        _ind("InfographicsVQA", "VQA", "question", 24),
        _ind("ChartQA", "VQA", "question", 28),
        _ind("Visual7W", "VQA", "question", 70),
        _ood("ScienceQA", "VQA", "question"),
        _ood("VizWiz", "VQA", "question"),
        _ood("GQA", "VQA", "question"),
        _ood("TextVQA", "VQA", "question"),
        _ind("VisDial", "Retrieval", "dialogue-to-image", 123),
        _ind("CIRR", "Retrieval", "image-to-image", 26),
        _ind("VisualNews_t2i", "Retrieval", "text-to-image", 100),
        _ind("VisualNews_i2t", "Retrieval", "label", 100),
        _ind("MSCOCO_t2i", "Retrieval", "text-to-image", 100),
        _ind("MSCOCO_i2t", "Retrieval", "label", 113),
        _ind("NIGHTS", "Retrieval", "image-to-image", 16),
        _ind("WebQA", "Retrieval", "text-to-image", 17),
        _ood("OVEN", "Retrieval", "image-to-image"),
        _ood("FashionIQ", "Retrieval", "image-to-image"),
        _ood("EDIS", "Retrieval", "text-to-image"),
        _ood("Wiki-SS-NQ", "Retrieval", "text-to-image"),
        _ind("MSCOCO", "Grounding", "image-to-image", 100),
        _ood("Visual7W-Pointing", "Grounding", "image-to-image"),
        _ood("RefCOCO", "Grounding", "image-to-image"),
        _ood("RefCOCO-Matching", "Grounding", "image-to-image", candidates_as_queries=True),
    ),
)
"""The Massive Multimodal Embedding Benchmark: 36 datasets, 20 in-domain and 16 out-of-domain (paper, Table I)."""
