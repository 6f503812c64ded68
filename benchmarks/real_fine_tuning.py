"""Fine-tunes SmolLM2-135M-Instruct on real texts: in-batch negatives against SaHa and HN, mined in two spaces.

python benchmarks/real_fine_tuning.py --output benchmarks/results/real_fine_tuning.json

The training pairs are definitions with their words (WordNet) and docstrings (`real/pairs.py`); the figures are
precision@1 on the reported tasks of `real_text.py`, which share no meaning and no library with the pairs. Every row is
sampled by `gen2embed sample` and trained by `gen2embed train`, as a user would run them, and evaluated without a
calibration.

SaHa and HN are mined twice: in the space of the model as it is, and in the calibrated one (`gen2embed calibrate` on the
same pairs, without their labels). Every definition is in two pairs, with two of its words. So it is known which chosen
negatives are false: those that mean the same. Their share is in the table.

All rows but those of HN see the same number of pairs in batches of the same size. A query of HN has seven negatives of
its own, so a batch holds a quarter of the queries; `HN, same pairs` takes four times as many steps, and `HN, same
cost` as many as take the time of in-batch's tokens.

Runs are kept in --work_dir, and figures in --output: a command that is called again does only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from real import sources
from real.pairs import write_pairs
from real.report import write_tables
from real.scores import Scorer, Setting, mean_of, names_of
from real.tasks import Task, digest, make_tasks
from real.vectors import VectorCache, exported

from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.storage.developer_files import write_json
from trainers.sampling.files import SampledClusters, read_sampling

PROMPT = "hierarchical"
K = 7
HN_BATCHES = 4
"""How many batches of HN hold the queries of one batch of in-batch."""


@dataclass(frozen=True)
class Row:
    """How negatives are found, in which space, and how many steps are made per step of in-batch."""

    name: str
    method: str
    calibrated: bool = False
    steps: float = 1.0

    @property
    def slug(self) -> str:
        """The name of its folders."""
        return f"{self.method}-{'calibrated' if self.calibrated else 'raw'}-{self.steps:g}"

    @property
    def is_hn(self) -> bool:
        """Whether each query has negatives of its own."""
        return self.method.startswith("hn")


ROWS = (
    Row("in-batch", "in-batch"),
    Row("SaHa", "saha"),
    Row("SaHa, mined in the calibrated space", "saha", calibrated=True),
    Row("HN, same cost", "hn", steps=1.5),
    Row("HN + beta, same cost", "hn-beta", steps=1.5),
    Row("HN + beta, same cost, mined in the calibrated space", "hn-beta", calibrated=True, steps=1.5),
    Row("HN, same pairs", "hn", steps=HN_BATCHES),
    Row("HN + beta, same pairs", "hn-beta", steps=HN_BATCHES),
)


def main() -> None:
    """Sample, train and evaluate what is missing, print the table, and write the JSON after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("build/real_text"))
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs per step; a multiple of 32")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=None, help="only these: " + ", ".join(row.slug for row in ROWS))
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster where the CPU has AMX")
    parser.add_argument("--no_dora", action="store_true", help="plain LoRA: a step takes three fifths of the time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pages", action="store_true", help="write the table into the page of results")
    arguments = parser.parse_args()
    settings = {
        name: getattr(arguments, name) for name in ("max_steps", "batch_size", "learning_rate", "bf16", "no_dora")
    }
    work = arguments.work_dir
    wordnet = sources.wordnet(work)
    tasks = make_tasks(wordnet)
    bench = _Bench(arguments, settings, tasks, write_pairs(work / "pairs", wordnet, tasks))
    record = bench.record()
    if "zero-shot" not in record["figures"]:
        record["figures"]["zero-shot"] = bench.evaluate(bench.model, "smollm2")
    for row in ROWS:
        if arguments.rows is None or row.slug in arguments.rows:
            record["negatives"].setdefault(row.name, bench.sample(row))
    for seed in range(arguments.seeds):
        for row in ROWS:
            if arguments.rows is None or row.slug in arguments.rows:
                runs = record["runs"].setdefault(row.name, {})
                if str(seed) not in runs:
                    runs[str(seed)] = bench.train(row, seed)
                    bench.write(record)
                    print(f"{row.name}, seed {seed}: {percent(runs[str(seed)]['reported'])}", flush=True)
    bench.write(record)
    print(as_text(table(record)))
    if arguments.pages:
        write_tables(page_tables(record))


class _Bench:
    """Runs the commands, and reads their results."""

    def __init__(self, arguments: argparse.Namespace, settings: dict[str, Any], tasks: list[Task], pairs: Path) -> None:
        self._arguments = arguments
        self._settings = settings
        self._work: Path = arguments.work_dir
        self._tasks = [task for task in tasks if task.half == "reported"]
        self._pairs = pairs
        made_with = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self._folder = self._work / "fine_tuning"
        self._runs = self._folder / made_with
        self.model = exported(sources.smollm2(self._work), self._work / "smollm2-float32", gguf_file=sources.SMOLLM2)

    def record(self) -> dict[str, Any]:
        """Return the results so far; those of other settings or texts are refused."""
        facts = {"settings": self._settings, "digest": digest(self._tasks)}
        path: Path = self._arguments.output
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if {name: found[name] for name in facts} != facts:
                raise SystemExit(f"{path} is of other settings or texts: name another --output, or delete it")
            return found
        return {**facts, "figures": {}, "negatives": {}, "runs": {}}

    def write(self, record: dict[str, Any]) -> None:
        """Write the results so far."""
        facts = {"versions": installed_versions(), "command": shlex.join(["python", *sys.argv])}
        write_json(self._arguments.output, {**record, **facts})

    def sample(self, row: Row) -> dict[str, float]:
        """Sample as a row says; return the share of chosen negatives that mean the same as the query."""
        output = self._folder / "sampled" / f"{row.method}-{'calibrated' if row.calibrated else 'raw'}"
        model = self._calibrated() if row.calibrated else self.model
        words = ["sample", "--model_name", str(model), "--data_dir", str(self._pairs), "--output_dir", str(output)]
        words += ["--embedding_dir", str(self._folder / "embeddings" / model.name), "--method", row.method]
        words += ["--columns", "query", "positive", "--prompt_mode", PROMPT]
        words += [] if row.method == "in-batch" else ["--num_hard_negatives", str(K)]
        words += ["--variant", "official"] if row.method == "saha" else []
        self._run(words, f"sample-{output.name}")
        if row.method == "in-batch":
            return {}
        truth = json.loads((self._pairs.parent / "truth" / "glosses.json").read_text("utf-8"))
        return _false_share(read_sampling(output / "glosses.parquet").clusters, np.array(truth))

    def train(self, row: Row, seed: int) -> dict[str, Any]:
        """Train and evaluate a row."""
        output = self._runs / f"{row.slug}-{seed}"
        steps = round(self._settings["max_steps"] * row.steps)
        batch = self._settings["batch_size"] // (HN_BATCHES if row.is_hn else 1)
        sampled = self._folder / "sampled" / f"{row.method}-{'calibrated' if row.calibrated else 'raw'}"
        words = [
            "train",
            "--model_name",
            str(self.model),
            "--processed_data_path",
            str(sampled),
            "--prompt_mode",
            PROMPT,
        ]
        words += ["--batch_size", str(batch), "--max_steps", str(steps), "--warmup_steps", str(steps // 10)]
        words += ["--learning_rate", str(self._settings["learning_rate"]), "--lora_dropout", "0", "--seed", str(seed)]
        words += ["--sub_batch_size", "32", "--no_mask_equal_positives", "--save_strategy", "no", "--report_to", "none"]
        words += ["--bf16", "true", "--use_cpu"] if self._settings["bf16"] else []
        words += ["--no_dora"] if self._settings["no_dora"] else []
        start = time.monotonic()
        self._run([*words, "--output_dir", str(output)], output.name)
        facts = json.loads((output / "train.json").read_text("utf-8"))["metrics"]
        figures = self.evaluate(output, output.name)
        return {
            **figures,
            "train_loss": facts["train_loss"],
            "steps": steps,
            "seconds": round(time.monotonic() - start),
        }

    def evaluate(self, folder: Path, name: str) -> dict[str, Any]:
        """Return precision@1 of each reported task, and their mean."""
        dtype = "bfloat16" if self._settings["bf16"] else None
        vectors = VectorCache(folder, self._runs / "vectors" / name, self._tasks, (Readout(),), dtype)
        vectors.encode([PROMPT])
        scorer = Scorer(self._tasks, partial(vectors.of, PROMPT, Readout()))
        hits = {task.name: scorer.hits(task, Setting("none")) for task in self._tasks}
        mean = mean_of(hits, names_of(self._tasks, "reported"))
        return {
            "reported": mean.figure,
            "interval": mean.as_list()[1:],
            "tasks": {task: round(float(found.mean()), 4) for task, found in hits.items()},
        }

    def _calibrated(self) -> Path:
        folder = self._folder / "calibrated"
        if not (folder / "modules.json").is_file():
            words = ["calibrate", str(self.model), str(folder), "--data", str(self._pairs), "--prompt_mode", PROMPT]
            self._run([*words, "--columns", "query", "positive", "--limit", "2000"], "calibrate")
        return folder

    def _run(self, words: list[str], name: str) -> None:
        log = self._folder / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._arguments.threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "gen2embed_mteb.cli", *words]
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(command, env=environment, stdout=output, stderr=output, check=False)  # noqa: S603
        if done.returncode:
            raise SystemExit(f"failed with {done.returncode}: gen2embed {' '.join(words)}\nsee {log}")


def _false_share(clusters: SampledClusters, truth: Any) -> dict[str, float]:
    """Return the share of (anchor, member) pairs of one meaning: false negatives."""
    real = clusters.members >= 0
    equal = (truth[clusters.members] == truth[clusters.anchors][:, None]) & real
    return {"false": round(float(equal.sum() / real.sum()), 4), "chosen": int(real.sum())}


def table(record: dict[str, Any]) -> Table:
    """Return the figures as a table, with its header.

    Args:
        record: The content of the JSON file.
    """
    zero = record["figures"]["zero-shot"]["reported"]
    rows = [["", "P@1, reported", "seeds", "steps", "negatives", "of them false"]]
    rows += [["zero-shot", percent(zero), *["–"] * 4]]
    for name, runs in record["runs"].items():
        figures = [run["reported"] for run in runs.values()]
        if figures:
            deviation = f" ± {100 * statistics.stdev(figures):.1f}" if len(figures) > 1 else ""
            mined = record["negatives"].get(name, {})
            rows.append(
                [
                    name,
                    percent(statistics.fmean(figures)) + deviation,
                    str(len(figures)),
                    str(next(iter(runs.values()))["steps"]),
                    f"{mined['chosen']:,}" if mined else "–",
                    percent(mined.get("false")),
                ]
            )
    return rows


def page_tables(record: dict[str, Any]) -> dict[str, str]:
    """Return the table of the page in Markdown, by its name there."""
    return {"fine-tuning on real weights": as_markdown(table(record))}


if __name__ == "__main__":
    main()
