"""Measures `gen2embed calibrate --data docstrings` on real weights: SmolLM2-135M-Instruct, the tasks of `real_text.py`.

python benchmarks/docstring_calibration.py --output benchmarks/results/docstring_calibration.json

The map is that of the command, with its default settings: fitted on the first --limit pairs of `docstrings`, in which
no text of a task is. Beside it: no map, and a map of the same settings that is fitted on the inputs of other tasks.
Gains are paired, with 95 % bootstrap intervals over the queries of each task.

Vectors are kept in --work_dir, where `real_text.py` keeps its own, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from real import sources
from real.scores import Hits, Scorer, Setting, mean_of, names_of
from real.tasks import HALVES, Task, digest, make_tasks
from real.vectors import READOUTS, VectorCache, exported

from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text, percent
from gen2embed_mteb.storage.developer_files import write_json
from trainers.calibration import CalibrateConfig, read
from trainers.data import docstrings
from trainers.data.training_data import open_training_data

PROMPTS = ("none", "system", "hierarchical")
DEFAULTS = CalibrateConfig(data_dir=docstrings.NAME)
NONE = Setting("none")
SHIPPED = Setting(docstrings.NAME, DEFAULTS.shrinkage, DEFAULTS.means, among=docstrings.NAME)
OTHERS = Setting("other tasks", DEFAULTS.shrinkage, DEFAULTS.means)


def main() -> None:
    """Encode what is missing, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--work_dir", type=Path, default=Path("build/real_text"))
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--limit", type=int, default=DEFAULTS.limit, help="pairs to fit on")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    work = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    try:
        tasks = make_tasks(sources.wordnet(work))
        shipped = inputs(arguments.limit, work / "images")
        model = exported(sources.smollm2(work), work / "smollm2-float32", gguf_file=sources.SMOLLM2)
        vectors = VectorCache(model, work / "vectors" / "smollm2", [*tasks, shipped], READOUTS)
        vectors.encode(arguments.prompts)
    except Gen2EmbedError as error:
        sys.exit(f"error: {error}")
    runs: dict[str, dict[str, Any]] = {}
    for prompt in arguments.prompts:
        base = Scorer(tasks, partial(vectors.of, prompt, Readout()))
        with_shipped = Scorer([*tasks, shipped], partial(vectors.of, prompt, Readout()))
        hits = {
            one.name: {task.name: scorer.hits(task, one) for task in tasks}
            for scorer, one in ((base, NONE), (with_shipped, SHIPPED), (base, OTHERS))
        }
        runs[prompt] = {name: _run(found, hits[NONE.name], tasks) for name, found in hits.items()}
    texts = {text for task in tasks for text in (*task.queries, *task.documents)}
    record = {
        "limit": arguments.limit,
        "inputs": {"query": len(shipped.queries), "document": len(shipped.documents)},
        "inputs_shared_with_the_tasks": len(texts & {*shipped.queries, *shipped.documents}),
        "digest": digest(tasks),
        "digest_of_the_inputs": digest([shipped]),
        "runs": runs,
        "versions": installed_versions(),
        "command": " ".join(["python", "benchmarks/docstring_calibration.py", *sys.argv[1:]]),
    }
    if arguments.output:
        write_json(arguments.output, record)
    print(table(record))


def inputs(limit: int | None, cache: Path) -> Task:
    """Return what `gen2embed calibrate --data docstrings` fits on, as a task without candidates.

    Args:
        limit: Pairs to fit on.
        cache: A folder for images, of which there are none.
    """
    found = read(open_training_data(DEFAULTS, cache), limit)
    queries, documents = ([item.text for item in side] for side in (found.queries, found.documents))
    return Task(docstrings.NAME, "choice", ("text", "text"), queries, documents, np.zeros((0, 0), np.int64))


def _run(hits: dict[str, Hits], without: dict[str, Hits], tasks: list[Task]) -> dict[str, Any]:
    found: dict[str, Any] = {"tasks": {task.name: round(float(hits[task.name].mean()), 4) for task in tasks}}
    for half in HALVES:
        names = names_of(tasks, half)
        found[half] = mean_of(hits, names).as_list()
        found[f"{half}, gain"] = mean_of(hits, names, without).as_list()
    return found


def table(record: dict[str, Any]) -> str:
    """Return the means over the tasks of both halves, with the gains over no map."""
    rows = [["prompt", "fitted on", *(word for half in HALVES for word in (half, "gain"))]]
    for prompt, runs in record["runs"].items():
        for name, run in runs.items():
            words = [prompt, name]
            for half in HALVES:
                gain, low, high = (f"{100 * value:+.1f}" for value in run[f"{half}, gain"])
                words += [percent(run[half][0]), "–" if name == NONE.name else f"{gain} [{low}, {high}]"]
            rows.append(words)
    return as_text(rows)


if __name__ == "__main__":
    main()
