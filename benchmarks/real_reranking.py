"""Lets SmolLM2-135M-Instruct rerank what it found: the ten best candidates of the calibrated embedding.

python benchmarks/real_reranking.py --output benchmarks/results/real_reranking.json

The tasks are those of `real_text.py`, the first --limit queries of each. The embedding is that of the prompt `system`
with a calibration of the default settings, fitted on other tasks' inputs. Each candidate is scored together with the
query by the same weights, by each framing; the system turn says what query and candidate are. The order is then by the
framing's score alone, or by that score plus a weight times the cosine. The weight is chosen on the tasks that settings
may be chosen on; the figures are of the others. A tie keeps the order of the embedding.

Scores of finished tasks are kept in --work_dir.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from real import sources
from real.report import write_tables
from real.scores import Hits, Scorer, Setting, mean_of, names_of
from real.tasks import Task, digest, make_tasks
from real.vectors import READOUTS, VectorCache, exported
from tqdm import tqdm

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.calibration.fitting import SHRINKAGE
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.embedder.reranking.framings import FRAMINGS
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_markdown, as_text, percent
from gen2embed_mteb.storage.developer_files import write_atomic, write_json

PROMPT = "system"
SETTING = Setting(f"shared {SHRINKAGE:g}", SHRINKAGE)
WEIGHTS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)
Scores = npt.NDArray[np.float64]


def main() -> None:
    """Score what is missing, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--work_dir", type=Path, default=Path("build/real_text"))
    parser.add_argument("--framings", nargs="+", choices=list(FRAMINGS), default=["likelihood", "mcq"])
    parser.add_argument("--limit", type=int, default=100, help="queries per task")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--pages", action="store_true", help="write the table into the page of results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    work = arguments.work_dir
    tasks = make_tasks(sources.wordnet(work))
    folder = exported(sources.smollm2(work), work / "smollm2-float32", gguf_file=sources.SMOLLM2)
    vectors = VectorCache(folder, work / "vectors" / "smollm2", tasks, READOUTS)
    vectors.encode([PROMPT])
    scorer = Scorer(tasks, partial(vectors.of, PROMPT, Readout()))
    model = Gen2Embed(folder, device="cpu", prompt_mode="none")
    found, health = {}, {}
    for framing in arguments.framings:
        start = time.monotonic()
        judge = _Judge(model, framing, work / "reranking", arguments)
        scored = {task.name: judge.scores(task, *_best(scorer, task, arguments)) for task in tasks}
        found[framing] = {weight: _hits(scorer, tasks, scored, weight, arguments) for weight in (*WEIGHTS, np.inf)}
        health[framing] = {**judge.health(), "seconds": round(time.monotonic() - start)}
    record = {
        "settings": {"limit": arguments.limit, "top": arguments.top, "prompt": PROMPT, "calibration": SETTING.name},
        "digest": digest(tasks),
        "runs": [_run(framing, weight, found, tasks) for framing in found for weight in found[framing]],
        "chosen": {framing: _chosen(found[framing], tasks) for framing in found},
        "health": health,
        "versions": installed_versions(),
        "command": " ".join(["python", "benchmarks/real_reranking.py", *sys.argv[1:]]),
    }
    if arguments.output:
        write_json(arguments.output, record)
    if arguments.pages:
        write_tables(page_tables(record))
    print(table(record))


class _Judge:
    """The scores of one framing, task by task."""

    def __init__(self, model: Gen2Embed, framing: str, folder: Path, arguments: argparse.Namespace) -> None:
        self._reranker = model.reranker(framing)
        self._scorer = self._reranker.query_scorer
        self._folder = folder
        self._name = f"{framing}-{arguments.limit}-{arguments.top}"
        self._framing = framing
        self._options: list[npt.NDArray[np.float32]] = []

    def scores(self, task: Task, queries: list[str], best: npt.NDArray[np.int64]) -> Scores:
        """Return the score of each query's best candidates, (q, k)."""
        path = self._folder / f"{self._name}-{task.name}.npz"
        if not path.is_file():
            instruction = f"The user gives a {task.kinds[0]}. Answer with the {task.kinds[1]} that belongs to it."
            rows, options = [], []
            for query, numbers in tqdm(list(zip(queries, best, strict=True)), desc=f"{self._framing} {task.name}"):
                pairs = self._scorer.score(query, [task.documents[number] for number in numbers], prompt=instruction)
                rows.append(pairs.scores)
                options.append(pairs.options)
            self._folder.mkdir(parents=True, exist_ok=True)
            _save(path, scores=np.array(rows), options=np.concatenate(options), best=best)
        with np.load(path) as kept:
            if not np.array_equal(kept["best"], best):
                raise SystemExit(f"{path} is of other candidates; delete it")
            self._options.append(kept["options"])
            return np.asarray(kept["scores"], np.float64)

    def health(self) -> dict[str, float]:
        """Return the probability of the two options together, and the share of answers where the first is ahead."""
        options = np.concatenate(self._options)
        if not options.shape[1]:
            return {}
        return {
            "mass": round(float(options.sum(axis=-1).mean()), 4),
            "share": round(float((options[..., 0] > options[..., 1]).mean()), 4),
        }


def _save(path: Path, **arrays: Any) -> None:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write_atomic(path, packed.getvalue())


def _best(scorer: Scorer, task: Task, arguments: argparse.Namespace) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the queries, and for each the numbers of its best candidates, best first: (q, k)."""
    cosines = scorer.cosines(task, SETTING)[: arguments.limit]
    order = np.argsort(-cosines, axis=1, kind="stable")[:, : arguments.top]
    return task.queries[: arguments.limit], np.take_along_axis(task.candidates[: arguments.limit], order, axis=1)


def _hits(
    scorer: Scorer, tasks: list[Task], scored: dict[str, Scores], weight: float, arguments: argparse.Namespace
) -> dict[str, Hits]:
    """Return for each query whether the right candidate is first; an infinite weight is the embedding alone."""
    hits = {}
    for task in tasks:
        cosines = scorer.cosines(task, SETTING)[: arguments.limit]
        order = np.argsort(-cosines, axis=1, kind="stable")[:, : arguments.top]
        best = np.take_along_axis(cosines, order, axis=1)
        total = best if np.isinf(weight) else scored[task.name] + weight * best
        first = np.take_along_axis(order, total.argmax(axis=1)[:, None], axis=1)[:, 0]
        hits[task.name] = first == 0
    return hits


def _chosen(found: dict[float, dict[str, Hits]], tasks: list[Task]) -> dict[str, Any]:
    """Return what the weight that is best on the first half gives on the other."""
    first, second = names_of(tasks, "choice"), names_of(tasks, "reported")
    weight = max(WEIGHTS, key=lambda one: mean_of(found[one], first).figure)
    return {
        "weight": weight,
        "choice": mean_of(found[weight], first).as_list(),
        "reported": mean_of(found[weight], second).as_list(),
        "gain": mean_of(found[weight], second, found[np.inf]).as_list(),
        "tasks": {task.name: round(float(found[weight][task.name].mean()), 4) for task in tasks},
    }


def _run(framing: str, weight: float, found: Any, tasks: list[Task]) -> dict[str, Any]:
    hits = found[framing][weight]
    halves = {half: mean_of(hits, names_of(tasks, half)).as_list() for half in ("choice", "reported")}
    return {"framing": framing, "weight": "embedding alone" if np.isinf(weight) else weight, **halves}


def page_tables(record: dict[str, Any]) -> dict[str, str]:
    """Return the table of the page in Markdown, by name: what was chosen, on the reported tasks."""
    reported = {(run["framing"], run["weight"]): percent(run["reported"][0]) for run in record["runs"]}
    rows = [["framing", "weight", "before", "after", "gain", "by the framing alone"]]
    for framing, chosen in record["chosen"].items():
        gain, low, high = map(percent, chosen["gain"])
        before, alone = reported[framing, "embedding alone"], reported[framing, 0.0]
        after = percent(chosen["reported"][0])
        rows.append([f"`{framing}`", f"{chosen['weight']:g}", before, after, f"{gain} [{low}, {high}]", alone])
    return {"reranking table": as_markdown(rows)}


def table(record: dict[str, Any]) -> str:
    """Return precision@1 on both halves by framing and weight, and what was chosen."""
    rows = [["framing", "weight of the cosine", "choice", "reported"]]
    rows += [
        [run["framing"], str(run["weight"]), percent(run["choice"][0]), percent(run["reported"][0])]
        for run in record["runs"]
    ]
    lines = [as_text(rows)]
    for framing, chosen in record["chosen"].items():
        gain, low, high = map(percent, chosen["gain"])
        health = ", ".join(f"{name} {value}" for name, value in record["health"][framing].items())
        lines.append(f"{framing}: weight {chosen['weight']:g}, gain {gain} [{low}, {high}]; {health}")
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
