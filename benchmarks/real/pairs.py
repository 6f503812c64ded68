"""Training pairs of real texts, of which WordNet says what else would be right: definition to word, summary to details.

No meaning and no library of the tasks is in them. Every definition is paired with two of its words in two pairs, so
each of the two words is a positive of the other pair's query that nobody labelled: a false negative if a method
chooses it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.storage.developer_files import write_atomic, write_json
from real.tasks import Task, shuffled, usable
from real.wordnet import PARTS, read
from trainers.data.docstrings import functions

LIBRARIES = (
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.optim",
    "torch.linalg",
    "torch.special",
    "torch.fft",
    "pyarrow.compute",
    "peft",
    "datasets",
    "huggingface_hub",
)
NUM_MEANINGS = 900
NUM_FUNCTIONS = 400


def write_pairs(folder: Path, wordnet: Path, tasks: Sequence[Task]) -> Path:
    """Write the pairs as `gen2embed sample` reads them, and what each pair means into `truth/SUBSET.json`.

    Args:
        folder: The folder to write.
        wordnet: The folder of WordNet's files.
        tasks: The tasks, whose texts are left out.

    Returns:
        The folder of the tables.
    """
    used = {text.lower() for task in tasks for text in (*task.queries, *task.documents)}
    meanings = []
    for part in PARTS:
        for one in usable(read(wordnet, part)):
            texts = {text.lower() for text in (*one.words, one.gloss)}
            if len(one.words) > 1 and not texts & used:
                meanings.append(one)
                used |= texts
    meanings = shuffled(meanings, "pairs")[:NUM_MEANINGS]
    glosses = [(one.gloss, word, number) for number, one in enumerate(meanings) for word in one.words[:2]]
    found = shuffled(functions(LIBRARIES), "pairs")
    described = [one for one in found if one.detail and not {one.summary, one.detail} & used]
    details = [(one.summary, one.detail, number) for number, one in enumerate(described[:NUM_FUNCTIONS])]
    tables = folder / "pairs"
    for name, pairs in (("glosses", glosses), ("docstrings", details)):
        mixed = shuffled(pairs, name)
        lines = [json.dumps({"query": query, "positive": positive}) + "\n" for query, positive, _ in mixed]
        tables.mkdir(parents=True, exist_ok=True)
        (folder / "truth").mkdir(exist_ok=True)
        write_atomic(tables / f"{name}.jsonl", "".join(lines).encode())
        write_json(folder / "truth" / f"{name}.json", [number for _, _, number in mixed])
    return tables
