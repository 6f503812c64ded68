"""Measures calibration and CSLS on MMEB-mini, without training and without labels, by one command.

python benchmarks/calibration.py --output benchmarks/results/calibration.json

Each strategy of the prompt is evaluated as it is; with maps that were fitted on MMEB-mini's training inputs; with maps
fitted on the evaluation's own inputs; and with CSLS. Differences are paired, with 95 % bootstrap intervals over the
rows of each dataset.

Training and evaluation inputs are encoded once per strategy. Vectors are kept in --work_dir, so an interrupted run goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.calibration.fitting import Moments, attach, detach, fit
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_markdown, percent
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mini.benchmark import MMEB_MINI, SEED, ensure
from gen2embed_mteb.mini.places import EVAL_IMAGES, EVAL_TABLES
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.readers import EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.report import results_json
from gen2embed_mteb.mmeb.scoring import EvaluationResult, average
from gen2embed_mteb.mmeb.tables import open_subset
from gen2embed_mteb.storage.developer_files import write_json
from trainers.calibration import CalibrateConfig, read
from trainers.data.training_data import open_training_data

COMMAND = "python benchmarks/calibration.py --output benchmarks/results/calibration.json"
PROMPTS = ("hierarchical", "system")
FITS: dict[str, dict[str, Any]] = {
    "default": {},
    "side means": {"means": "side"},
    "one mean alone": {"shrinkage": 1.0},
    "2,084 pairs": {"limit": 2084},
    "all pairs": {"limit": None},
    "all pairs, side means": {"limit": None, "means": "side"},
}
"""Maps fitted on training inputs, by name; the default is that of `gen2embed calibrate`: 2,000 pairs, 0.9, shared."""
RUNS: dict[str, dict[str, Any]] = {
    "none": {},
    **{f"calibrated: {name}": {"fit": name} for name in FITS},
    "own": {"calibration": "own"},
    "own: side means": {"calibration": "own", "means": "side"},
    "own: side means alone": {"calibration": "own", "means": "side", "shrinkage": 1.0},
    "csls": {"scoring": "csls"},
    "calibrated + csls": {"fit": "default", "scoring": "csls"},
    "own + csls": {"calibration": "own", "scoring": "csls"},
}
"""What is measured, by name."""
RESAMPLES = 2000


def main() -> None:
    """Evaluate every run, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="gen2embed-mini")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("results/calibration"))
    parser.add_argument("--limit", type=int, default=None, help="rows per dataset (default: all)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    root = ensure("eval")
    prompts = {}
    for mode in PROMPTS:
        model = Gen2Embed(arguments.model_name, prompt_mode=mode)
        folder = arguments.work_dir / mode
        folders = _calibrated(model, folder)
        digest = fingerprint(model)
        outcomes = {}
        for name, options in RUNS.items():
            chosen = dict(options)
            fit_name = chosen.pop("fit", None)
            if fit_name is not None:
                chosen["calibration"] = str(folders[fit_name])
            config = EvaluationConfig(
                data_dir=str(root / EVAL_TABLES),
                image_dir=str(root / EVAL_IMAGES),
                output_dir=str(folder / "runs" / str(len(outcomes))),
                embedding_dir=str(folder / "embeddings"),
                limit=arguments.limit,
                model_name=arguments.model_name,
                prompt_mode=mode,
                fingerprint=digest,
                overwrite=True,
                **chosen,
            )
            outcomes[name] = (evaluate(PrefixEncoder(model), MMEB_MINI, config), config)
            print(f"{mode}, {name}: {percent(average(outcomes[name][0].scores).overall)}", flush=True)
        prompts[mode] = {"runs": _record(outcomes)}
    print(as_markdown(table(prompts)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.output,
        {
            "command": COMMAND,
            "model": arguments.model_name,
            "benchmark": MMEB_MINI.name,
            "seed": SEED,
            "limit": arguments.limit,
            "versions": installed_versions(),
            "inputs_shared_with_the_evaluation": shared_inputs(root, arguments.limit),
            "prompts": prompts,
        },
    )


def _calibrated(model: Gen2Embed, folder: Path) -> dict[str, Path]:
    """Write a calibrated folder for each of `FITS`, as `gen2embed calibrate` does; inputs are encoded once for all."""
    config = CalibrateConfig(data_dir="mmeb-mini")
    data = open_training_data(config, folder / "images")
    store = EmbeddingStore(folder / "training", {"fingerprint": fingerprint(model)})
    bulk = BulkEncoder(PrefixEncoder(model), store, data.images, image_options=model.image_options)
    whole = read(data, None)
    bulk.add("query", whole.queries, "training queries")
    bulk.add("document", whole.documents, "training candidates")
    written = {}
    for number, (name, options) in enumerate(FITS.items()):
        chosen = {"limit": config.limit, "shrinkage": config.shrinkage, "means": config.means, **options}
        inputs = read(data, chosen.pop("limit"))
        sums = []
        for side, items in (("query", inputs.queries), ("document", inputs.documents)):
            vectors = bulk.vectors(side, items)
            sums.append(Moments(vectors.shape[1]))
            sums[-1].add(vectors)
        attach(model, fit(*sums, data="MMEB-mini's training inputs", **chosen))
        written[name] = folder / "calibrated" / str(number)
        model.save_pretrained(str(written[name]))
        detach(model)
    return written


def shared_inputs(root: Path, limit: int | None) -> dict[str, dict[str, int]]:
    """Count the inputs of the default fit that are inputs of the evaluation too, by text and content of the images.

    Args:
        root: Where MMEB-mini is.
        limit: Rows per dataset of the evaluation.
    """
    images = ImageSource(root / EVAL_IMAGES)
    evaluated: dict[str, set[Any]] = {"query": set(), "document": set()}
    for dataset in MMEB_MINI.datasets:
        side = "query" if dataset.candidates_as_queries else "document"
        for row in read_eval_rows(open_subset(root / EVAL_TABLES, dataset, "test"), dataset, limit):
            if isinstance(row, EvalRow):
                evaluated["query"].add(_content(images, row.query))
                evaluated[side].update(_content(images, item) for item in row.candidates)
    config = CalibrateConfig(data_dir="mmeb-mini")
    with tempfile.TemporaryDirectory() as folder:
        data = open_training_data(config, Path(folder))
        inputs = read(data, config.limit)
        fitted = {"query": inputs.queries, "document": inputs.documents}
        found = {side: {_content(data.images, item) for item in items} for side, items in fitted.items()}
    return {
        side: {"fitted": len(items), "evaluated": len(evaluated[side]), "shared": len(items & evaluated[side])}
        for side, items in found.items()
    }


def _content(images: Any, item: Item) -> tuple[str, tuple[str, ...]]:
    return item.text, tuple(images.facts(path).digest for path in item.images)


def _record(outcomes: dict[str, tuple[EvaluationResult, EvaluationConfig]]) -> dict[str, Any]:
    base = outcomes["none"][0]
    found = {}
    for name, (result, config) in outcomes.items():
        averages, written = average(result.scores), results_json(result, config)
        found[name] = {
            "method": written["method"],
            "meta_tasks": averages.meta_tasks,
            "ind": averages.ind,
            "ood": averages.ood,
            "overall": averages.overall,
            "overall_strict": average(result.scores, strict=True).overall,
            "gain": difference(hits(base), hits(result)),
            "datasets": {score.dataset.name: score.precision_at_1 for score in result.scores},
            "num_errors": len(result.errors),
        }
    return found


def hits(result: EvaluationResult) -> list[np.ndarray]:
    """Return whether each row is a hit, per dataset."""
    return [np.array([row.rank == 0 for row in score.rows], dtype=np.float64) for score in result.scores]


def difference(before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, float]:
    """Return the gain of the average over datasets, with a 95 % interval of a paired bootstrap over rows.

    Args:
        before: Hits of each row, per dataset.
        after: The same rows with another method.
    """
    random = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    gains = [now - then for then, now in zip(before, after, strict=True)]
    for gain in gains:
        means += gain[random.integers(0, len(gain), (RESAMPLES, len(gain)))].mean(axis=1) / len(gains)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(np.mean([gain.mean() for gain in gains])), "low": float(low), "high": float(high)}


def table(prompts: dict[str, Any]) -> list[list[str]]:
    """Return the table of the page of results: one row per run, two columns per strategy, and how it was obtained."""
    head = [cell for mode in prompts for cell in (f"`{mode}`", "gain")]
    rows = [["", *head, "unlabelled inputs", "transductive"]]
    for name in RUNS:
        cells = []
        for found in prompts.values():
            gain = found["runs"][name]["gain"]
            low, high = (f"{100 * gain[end]:+.1f}" for end in ("low", "high"))
            cells.append(percent(found["runs"][name]["overall"]))
            cells.append("–" if name == "none" else f"{100 * gain['mean']:+.1f} [{low}, {high}]")
        method = next(iter(prompts.values()))["runs"][name]["method"]
        used = " + ".join(f"{entry['count']:,} {entry['of']}" for entry in method["unlabelled_inputs"])
        rows.append([name, *cells, used or "0", "yes" if method["transductive"] else "no"])
    return rows


if __name__ == "__main__":
    main()
