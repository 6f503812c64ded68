"""Measures vectors that are cut short on the tasks of `real_text.py`: to the first dimensions, or those that vary most.

python benchmarks/real_truncation.py --output benchmarks/results/real_truncation.json

A model that was not trained for it spreads what it knows over all dimensions. A calibration comes with an order of its
own: the directions in which its inputs vary most. The map is fitted on the inputs of the half that settings may be
chosen on; the figures are precision@1 on the reported half, SmolLM2-135M-Instruct, 576 dimensions, last state.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from real import sources
from real.report import PAGE
from real.scores import Scorer, Setting, mean_of, names_of
from real.tasks import digest, make_tasks
from real.vectors import READOUTS, VectorCache, exported

from gen2embed_mteb.embedder.calibration.fitting import SHRINKAGE
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.storage.developer_files import write_atomic, write_json

STRATEGIES = ("system", "hierarchical")
WIDTHS = (16, 32, 64, 128, 256, 0)
KINDS = (
    Setting("no map, first dimensions"),
    Setting(f"shared {SHRINKAGE:g}, first dimensions", SHRINKAGE),
    Setting(f"shared {SHRINKAGE:g}, by variance", SHRINKAGE, by_variance=True),
    Setting("shared 0.5, by variance", 0.5, by_variance=True),
)
_START, _END = "<!-- truncation table -->", "<!-- end of the table -->"


def main() -> None:
    """Encode what is missing, score, print the table, and write the JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("build/real_text"))
    parser.add_argument("--pages", action="store_true", help="write the table into the page of results")
    arguments = parser.parse_args()
    work: Path = arguments.work_dir
    tasks = make_tasks(sources.wordnet(work))
    model = exported(sources.smollm2(work), work / "smollm2-float32", gguf_file=sources.SMOLLM2)
    vectors = VectorCache(model, work / "vectors" / "smollm2", tasks, READOUTS)
    vectors.encode(STRATEGIES)
    runs: list[dict[str, Any]] = []
    for name in STRATEGIES:
        scorer = Scorer(tasks, partial(vectors.of, name, READOUTS[0]))
        for kind in KINDS:
            for width in WIDTHS:
                setting = Setting(kind.name, kind.shrinkage, width=width, by_variance=kind.by_variance)
                hits = {task.name: scorer.hits(task, setting) for task in tasks if task.half == "reported"}
                found = mean_of(hits, names_of(tasks, "reported")).as_list()
                runs.append({"prompt": name, "kind": kind.name, "width": width, "reported": found})
    command = shlex.join(["python", *sys.argv])
    record = {"digest": digest(tasks), "runs": runs, "versions": installed_versions(), "command": command}
    print(as_text(table(record)))
    write_json(arguments.output, record)
    if arguments.pages:
        before, start, rest = PAGE.read_text("utf-8").partition(_START)
        _, end, after = rest.partition(_END)
        if not (start and end):
            raise SystemExit(f"{PAGE}: the marks {_START} and {_END} are not in it")
        page = f"{before}{start}\n\n{as_markdown(table(record))}\n\n{end}{after}"
        write_atomic(PAGE, page.encode())


def table(record: dict[str, Any]) -> Table:
    """Return a row per prompt and kind, a column per number of dimensions."""
    rows: dict[tuple[str, str], list[str]] = {}
    for run in record["runs"]:
        rows.setdefault((run["prompt"], run["kind"]), []).append(percent(run["reported"][0]))
    return [["prompt", "map, dimensions", *(str(width or "all") for width in WIDTHS)]] + [
        [*names, *figures] for names, figures in rows.items()
    ]


if __name__ == "__main__":
    main()
