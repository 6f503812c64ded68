"""Repeats the paper's Table IV on MMEB-mini: every prompt strategy, zero-shot, by one command.

python benchmarks/prompt_strategies.py --output benchmarks/results/prompt_strategies.json

Vectors are kept in --work_dir, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.paper import TABLE_IV
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text, percent
from gen2embed_mteb.mini.benchmark import MMEB_MINI, SEED, ensure
from gen2embed_mteb.mini.places import EVAL_IMAGES, EVAL_TABLES
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.scoring import average
from gen2embed_mteb.storage.developer_files import write_json


def main() -> None:
    """Evaluate every strategy, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="gen2embed-mini")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("results/prompt_strategies"))
    parser.add_argument("--data_dir", type=Path, default=None, help="where MMEB-mini is kept (default: user's cache)")
    parser.add_argument("--limit", type=int, default=None, help="rows per dataset (default: all)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    root = ensure("eval", arguments.data_dir)
    strategies = {}
    for row in TABLE_IV:
        started = time.monotonic()
        model = Gen2Embed(arguments.model_name, prompt_mode=row.prompt_mode)
        config = EvaluationConfig(
            data_dir=str(root / EVAL_TABLES),
            image_dir=str(root / EVAL_IMAGES),
            output_dir=str(arguments.work_dir / row.prompt_mode),
            limit=arguments.limit,
            model_name=arguments.model_name,
            prompt_mode=row.prompt_mode,
            fingerprint=fingerprint(model),
        )
        result = evaluate(PrefixEncoder(model), MMEB_MINI, config)
        official, strict = average(result.scores), average(result.scores, strict=True)
        strategies[row.prompt_mode] = {
            "label": row.label,
            "meta_tasks": official.meta_tasks,
            "ind": official.ind,
            "ood": official.ood,
            "overall": official.overall,
            "overall_strict": strict.overall,
            "datasets": {score.dataset.name: score.precision_at_1 for score in result.scores},
            "num_errors": len(result.errors),
            "paper": row.figures,
            "seconds": round(time.monotonic() - started, 1),
        }
        print(f"{row.prompt_mode}: {percent(official.overall)}", flush=True)

    columns = [*MMEB_MINI.meta_tasks, "overall"]
    table = [["strategy", *columns, *(f"paper {name}" for name in columns)]]
    for mode, found in strategies.items():
        ours = [percent({**found["meta_tasks"], "overall": found["overall"]}[name]) for name in columns]
        table.append([mode, *ours, *(f"{found['paper'][name]:.1f}" for name in columns)])
    print(as_text(table))
    none = strategies["none"]["overall"]
    ratios = {mode: found["overall"] / none for mode, found in strategies.items()}
    print(f"hierarchical / none = {ratios['hierarchical']:.2f}, system / none = {ratios['system']:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.output,
        {
            "command": "python benchmarks/prompt_strategies.py --output benchmarks/results/prompt_strategies.json",
            "model": arguments.model_name,
            "benchmark": MMEB_MINI.name,
            "seed": SEED,
            "limit": arguments.limit,
            "versions": installed_versions(),
            "ratio_to_none": ratios,
            "strategies": strategies,
        },
    )


if __name__ == "__main__":
    main()
