"""Repeats the paper's Tables VII and VIII in miniature: `gen2embed-mini`, fine-tuned on MMEB-mini's training pairs.

python benchmarks/fine_tuning.py --output benchmarks/results/fine_tuning.json

Every row is sampled by `gen2embed sample`, and trained and evaluated by `gen2embed train`, as a user would run them.
All rows see the same number of pairs, --max_steps times --batch_size, which is most of one pass over them. The recipe
takes one and a half passes, and training on hard batches is slower at first, so a much shorter run would not show their
benefit.

A batch of HN and HN + beta holds a quarter of the queries, and there are four times as many batches, as in the paper
(256 queries against 1024 pairs). Each query has seven negatives of its own, so that a query still meets twice as many
candidates as in-batch. The paper's batch of SaHa is twice that of in-batch; here both are equal, and only the negatives
differ.

SaHa's clusters are made by the official code's variant of Algorithm 1, as the paper's figures were. The variant matters
more here than in the paper: it does not re-rank label sets, and a pool of 42 candidates holds all of a set of 40
labels, of which the variant of the paper's text would then take the least similar.

Nothing is masked, as in the paper. `SahaLoss` masks equal positives by default, which is a row of the second table.

Some settings differ from the recipe, which is for a model a thousand times larger and a run several times longer. The
learning rate is higher and its warm-up shorter; they were chosen only by the in-batch run's training loss (of 5e-4,
1e-3, 2e-3 at 32 steps, the lower of the two that learn well, as the run is longer). There is no dropout, as less than
one pass over the data cannot overfit. Sub-batches are of 32, which changes rounding and time.

The second table changes one setting of SaHa, k = 7: the pool multiplier (Table VIII), the representation prompt on
training queries, the masking of equal positives, the variant of Algorithm 1. The third table shows the effect of HN's
number of steps and of its cost: it has in-batch with as many steps of as few queries as HN, and HN with as many encoded
inputs as in-batch. A query of HN has nine inputs, which leaves it a quarter of the pairs. The last table has Table
VII's rows by meta-task.

Runs are kept in --work_dir, so an interrupted command goes on where it stopped, and the table is written anew after
each run; runs of other settings need another folder. --jobs runs several at a time, each on --threads threads: weights
do not depend on either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from gen2embed_mteb.evaluation.paper import TABLE_VII
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import Table, as_markdown, percent
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.mmeb.datasets import META_TASKS
from gen2embed_mteb.storage.developer_files import write_atomic, write_json

SETTINGS = ("model_name", "max_steps", "batch_size", "learning_rate", "warmup_steps", "eval_limit")
COLUMNS = ("ind", "ood", "overall")
METRIC = "eval_mmeb-mini_"
BY_META_TASK = {f"meta_task_{name}": name for name in META_TASKS}
COMMAND = "gen2embed"
MULTIPLIERS_OF_PAPER = {"m = 4": (70.8, 62.0, 66.9), "m = 6": (70.7, 61.9, 66.8), "m = 8": (70.6, 61.6, 66.6)}
"""Table VIII of the paper: IND, OOD and average."""


@dataclass(frozen=True)
class Row:
    """One row of a table: how it is sampled, how it is trained, and the paper's figures for it."""

    name: str
    sampling: tuple[str, ...]
    training: tuple[str, ...] = ()
    paper: tuple[float, ...] = ()
    batches: int = 1
    """How many batches together have --batch_size pairs."""
    steps: int | None = None
    """How many steps there are per step of in-batch; None: as many as are needed to see the same pairs."""

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())

    @property
    def sampling_slug(self) -> str:
        """The name of its sampling files' folder; rows that are sampled alike share it."""
        return "_".join(part.removeprefix("--") for part in self.sampling)


def _paper(label: str) -> tuple[float, ...]:
    return next(tuple(row.figures[name] for name in COLUMNS) for row in TABLE_VII if row.label == label)


def _saha(k: int = 7, *, m: int = 6, variant: str = "official") -> tuple[str, ...]:
    settings = {"num_hard_negatives": k, "pool_multiplier": m, "variant": variant}
    return ("--method", "saha", *(word for name, value in settings.items() for word in (f"--{name}", str(value))))


def _hn(method: str) -> tuple[str, ...]:
    return ("--method", method, "--num_hard_negatives", "7")


UNMASKED = ("--no_mask_equal_positives",)
"""The paper's loss masks nothing."""

TABLE = (
    Row("in-batch", ("--method", "in-batch"), UNMASKED, paper=_paper("In-batch")),
    Row("SaHa, k = 7", _saha(7), UNMASKED, paper=_paper("SaHa, k = 7")),
    Row("SaHa, k = 15", _saha(15), UNMASKED, paper=_paper("SaHa, k = 15")),
    Row("HN, k = 7", _hn("hn"), UNMASKED, paper=_paper("HN, k = 7"), batches=4),
    Row("HN + beta, k = 7", _hn("hn-beta"), UNMASKED, paper=_paper("HN + beta, k = 7"), batches=4),
)
"""Table VII; all its rows have the representation prompt in training, nothing masked, and m = 6."""

VARIATIONS = (
    Row("SaHa, k = 7, m = 4", _saha(m=4), UNMASKED, paper=MULTIPLIERS_OF_PAPER["m = 4"]),
    Row("SaHa, k = 7, m = 8", _saha(m=8), UNMASKED, paper=MULTIPLIERS_OF_PAPER["m = 8"]),
    Row("SaHa, k = 7, clusters by the paper's text", _saha(variant="paper"), UNMASKED),
    Row("SaHa, k = 7, equal positives masked", _saha()),
    Row("SaHa, k = 7, no representation prompt in training", _saha(), (*UNMASKED, "--no_query_prompt_in_training")),
)
"""Rows that change one setting of SaHa, k = 7."""

CONTROLS = (
    Row("in-batch, 16 pairs a batch", ("--method", "in-batch"), UNMASKED, batches=4),
    Row("HN, k = 7, a quarter of the pairs", _hn("hn"), UNMASKED, batches=4, steps=1),
    Row("HN + beta, k = 7, a quarter of the pairs", _hn("hn-beta"), UNMASKED, batches=4, steps=1),
)
"""In-batch with HN's queries and steps, and HN at in-batch's cost: a query of HN has nine inputs, a pair has two."""


def main() -> None:
    """Sample, train and evaluate what is missing, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON; a Markdown table is put beside it")
    parser.add_argument("--work_dir", type=Path, default=Path("results/fine_tuning"))
    parser.add_argument("--model_name", default="gen2embed-mini")
    parser.add_argument("--max_steps", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per step; a multiple of 64")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--eval_limit", type=int, default=300, help="rows per dataset")
    parser.add_argument("--seeds", type=int, default=3, help="of each row of Table VII")
    parser.add_argument("--variation_seeds", type=int, default=3, help="of each row below it")
    parser.add_argument("--rows", nargs="+", default=None, help="run only these (their folders' names)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    ensure("train")  # both are drawn here once, and not by several runs at the same time
    ensure("eval")
    planned = [(row, seed) for seed in range(arguments.seeds) for row in TABLE]
    planned += [(row, seed) for seed in range(arguments.variation_seeds) for row in (*VARIATIONS, *CONTROLS)]
    if arguments.rows:
        planned = [(row, seed) for row, seed in planned if row.slug in arguments.rows]
    runner = Runner(arguments)
    zero_shot = runner.zero_shot()
    for row in {row.sampling: row for row, _ in planned}.values():
        runner.sample(row)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for finished in pool.map(lambda task: runner.train(*task), planned):
            print(finished, flush=True)
            write_results(arguments, zero_shot)
    print(write_results(arguments, zero_shot))


class Runner:
    """Runs the commands whose results are not there yet."""

    def __init__(self, arguments: argparse.Namespace, more: tuple[str, ...] = ()) -> None:
        """Keep the arguments; `more` are those that runs must have in common beside `SETTINGS`."""
        self._arguments = arguments
        self._work_dir: Path = arguments.work_dir
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        self._cores: list[int] = sorted(os.sched_getaffinity(0))
        self._lock = Lock()
        keep_settings(arguments, more)

    def zero_shot(self, model: str = "", name: str = "zero-shot") -> dict[str, float]:
        """Evaluate a model as it is, by default that without training, with the same prompt and on the same rows."""
        folder = self._work_dir / name
        self.run(
            [
                *("evaluate", "--model_name", model or self._arguments.model_name, "--benchmark", "mmeb-mini"),
                *("--output_dir", str(folder), "--limit", str(self._arguments.eval_limit)),
            ],
            folder / "log.txt",
        )
        result = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        by_meta_task = {key: result["meta_tasks"][name]["precision_at_1"] for key, name in BY_META_TASK.items()}
        return {name: result[name] for name in COLUMNS} | by_meta_task

    def sample(self, row: Row) -> None:
        """Sample as `row` says; rows share their vectors, and finished subsets are kept."""
        folder = self._work_dir / "sampled" / row.sampling_slug
        self.run(
            [
                *("sample", "--model_name", self._arguments.model_name, "--data_dir", "mmeb-mini", *row.sampling),
                *("--output_dir", str(folder), "--embedding_dir", str(self._work_dir / "embeddings")),
            ],
            folder.with_suffix(".log"),
        )

    def train(self, row: Row, seed: int, model: str = "") -> str:
        """Train and evaluate, unless that is done, and return a line with the result; `model` is where it begins."""
        folder = self._work_dir / run_name(row, seed)
        if read_run(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            settings = settings_of(self._arguments, row) | ({"model_name": model} if model else {})
            words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            self.run(
                [
                    *("train", *words, "--lora_dropout", "0", "--resize", "processor", "--sub_batch_size", "32"),
                    *row.training,
                    *("--processed_data_path", str(self._work_dir / "sampled" / row.sampling_slug)),
                    *("--seed", str(seed), "--eval_benchmark", "mmeb-mini", "--eval_strategy", "no"),
                    *("--save_strategy", "no", "--report_to", "none", "--output_dir", str(folder)),
                ],
                folder.with_suffix(".log"),
            )
            (folder / "model.safetensors").unlink(missing_ok=True)  # the adapter stays
        figures = read_run(folder)
        if figures is None:
            raise SystemExit(f"{folder}: trained, but its train.json holds no figures; see {folder}.log")
        return f"{row.name}, seed {seed}: overall {100 * figures['overall']:.1f}, {figures['seconds']:.0f} s"

    def run(self, words: list[str], log: Path) -> None:
        """Run a command of gen2embed, and stop if it fails."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            # Each job is pinned to a core, if there are enough: threads that change cores slow each other down.
            core = self._cores.pop(0) if len(self._cores) > 1 and self._arguments.threads == 1 else None
        pin = [] if core is None else ["taskset", "--cpu-list", str(core)]
        try:
            with log.open("w", encoding="utf-8") as output:
                command = [*pin, sys.executable, "-m", "gen2embed_mteb.cli", *words]
                done = subprocess.run(command, env=self._environment, stdout=output, stderr=output, check=False)  # noqa: S603
        finally:
            if core is not None:
                with self._lock:
                    self._cores.append(core)
        if done.returncode:
            raise SystemExit(f"failed with {done.returncode}: {COMMAND} {' '.join(words)}\nsee {log}")


def run_name(row: Row, seed: int) -> str:
    """Return the folder of one run, relative to the working folder."""
    return f"{row.slug}/seed-{seed}"


def settings_of(arguments: argparse.Namespace, row: Row | None = None) -> dict[str, Any]:
    """Return the settings that all runs have in common, or those of one row."""
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if row is not None:
        steps = row.batches if row.steps is None else row.steps
        settings["batch_size"] //= row.batches
        settings["max_steps"] *= steps
        settings["warmup_steps"] *= steps
    return settings


def keep_settings(arguments: argparse.Namespace, more: tuple[str, ...] = ()) -> None:
    """Write the settings to the working folder, or stop if the runs there have other settings."""
    path = arguments.work_dir / "settings.json"
    settings = settings_of(arguments) | {name: getattr(arguments, name) for name in more}
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    elif (there := json.loads(path.read_text(encoding="utf-8"))) != settings:
        other = [
            f"{name} {there.get(name)}, not {value}" for name, value in settings.items() if there.get(name) != value
        ]
        raise SystemExit(f"{arguments.work_dir} holds runs of {'; '.join(other)}: pass another --work_dir")


def read_run(folder: Path) -> dict[str, float] | None:
    """Return a finished run's figures in [0, 1], its training loss and seconds; None if there is no finished run."""
    path = folder / "train.json"
    if not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8")).get("metrics", {})
    if f"{METRIC}overall" not in metrics:
        return None
    figures = {name.removeprefix(METRIC): value for name, value in metrics.items() if name.startswith(METRIC)}
    times = metrics  # older runs have no file of their own for times
    if (folder / "timing.json").is_file():
        times = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
    return {**figures, "seconds": times["train_runtime"], "train_loss": metrics["train_loss"]}


def write_results(arguments: argparse.Namespace, zero_shot: dict[str, float]) -> str:
    """Write the results so far as JSON and Markdown; return the Markdown."""
    tables = {}
    for title, rows in (("table_vii", TABLE), ("variations", VARIATIONS), ("controls", CONTROLS)):
        tables[title] = {row.name: summary for row in rows if (summary := summarize(row, arguments)) is not None}
    saha = tables["table_vii"].get("SaHa, k = 7")
    unchanged = {} if saha is None else {"SaHa, k = 7 (m = 6)": {**saha, "paper": MULTIPLIERS_OF_PAPER["m = 6"]}}
    shown = {**unchanged, **tables["variations"]}
    pairs = arguments.max_steps * arguments.batch_size
    lines = [
        f"`{arguments.model_name}` on MMEB-mini ({arguments.eval_limit} rows a dataset), {pairs:,} pairs seen, "
        "Precision@1 in percent, mean ± standard deviation over seeds; the paper: Qwen2-VL-2B on MMEB.",
        "",
        as_markdown(_table({"zero-shot": zero_shot}, tables["table_vii"])),
        "",
        as_markdown(_table({}, shown)),
        "",
        as_markdown(_table({}, tables["controls"])),
        "",
        as_markdown(_by_meta_task(zero_shot, tables["table_vii"])),
    ]
    markdown = "\n".join(lines) + "\n"
    record = {
        "command": "python " + " ".join(sys.argv),
        "settings": settings_of(arguments),
        "pairs_seen": pairs,
        "versions": installed_versions(),
        "written": time.strftime("%Y-%m-%d"),
        "zero_shot": zero_shot,
        **tables,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, record)
    write_atomic(arguments.output.with_suffix(".md"), markdown.encode())
    return markdown


def summarize(row: Row, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return mean and sample standard deviation over the seeds that have been run; None if there are none."""
    folders = sorted((arguments.work_dir / row.slug).glob("seed-*"))
    runs = {folder.name: run for folder in folders if (run := read_run(folder)) is not None}
    if not runs:
        return None
    columns: dict[str, Any] = {}
    for name in next(iter(runs.values())):
        values = [run[name] for run in runs.values()]
        columns[name] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
    return {
        **columns,
        "seeds": runs,
        "paper": list(row.paper),
        "sampling": list(row.sampling),
        "training": list(row.training),
        "settings": settings_of(arguments, row),
    }


def _table(single: dict[str, dict[str, float]], summaries: dict[str, dict[str, Any]]) -> Table:
    table = [["", "IND", "OOD", "overall", "training s", "seeds", "paper IND", "paper OOD", "paper overall"]]
    for name, figures in single.items():
        table.append([name, *(percent(figures[column]) for column in COLUMNS), *["–"] * 5])
    for name, summary in summaries.items():
        cells = [mean_sd(summary[column], 100) for column in COLUMNS]
        paper = [f"{figure:.1f}" for figure in summary["paper"]] or ["–"] * 3
        table.append([name, *cells, mean_sd(summary["seconds"], 1, 0), str(len(summary["seeds"])), *paper])
    return table


def _by_meta_task(zero_shot: dict[str, float], summaries: dict[str, dict[str, Any]]) -> Table:
    table = [["", *META_TASKS], ["zero-shot", *(percent(zero_shot[task]) for task in BY_META_TASK)]]
    for name, summary in summaries.items():
        table.append([name, *(mean_sd(summary[task], 100) for task in BY_META_TASK)])
    return table


def mean_sd(figure: dict[str, float | None], factor: float, digits: int = 1) -> str:
    """Return mean and standard deviation as text, both times `factor`."""
    mean, deviation = figure["mean"], figure["sd"]
    text = f"{factor * (mean or 0.0):.{digits}f}"
    return text if deviation is None else f"{text} ± {factor * deviation:.{digits}f}"


if __name__ == "__main__":
    main()
