"""The main job on the embedded default: the same model and the same data, without a prompt and with the two-level one.

MMEB-mini is drawn, `gen2embed-mini` evaluated under both prompts, two real photographs matched with captions, and a
page with pictures written. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen2embed_mteb.demo.page import DemoResult, Neighbours, write_page
from gen2embed_mteb.evaluation import EvaluationConfig
from gen2embed_mteb.fingerprint import fingerprint
from gen2embed_mteb.formatting import as_text, percent
from gen2embed_mteb.images import open_image
from gen2embed_mteb.mini import benchmark, model_dir
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.paper import TABLE_IV
from gen2embed_mteb.mmeb.readers import EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.scoring import EvaluationResult, average
from gen2embed_mteb.mmeb.tables import open_subset
from gen2embed_mteb.model import Gen2Embed
from gen2embed_mteb.prefix import PrefixEncoder

MODES = ("none", "hierarchical")
PHOTOS = ("china.jpg", "flower.jpg")
CAPTIONS = ("A red flower on green.", "A gray building under a blue sky.", "A handwritten seven.", "A black square.")
SHOWN = ("Scenes_t2i", "Pointing", "AttributeQA", "Digits")
"""Datasets whose first rows the report shows with their nearest candidates."""
ROWS_SHOWN, NEIGHBOURS = 3, 6


def run_demo(output_dir: Path, data_dir: Path | None = None, limit: int | None = None) -> Iterator[str]:
    """Run the demo and say how it goes, line by line.

    Args:
        output_dir: where results and `report.html` are written.
        data_dir: where MMEB-mini is kept; `None` is the user's cache folder.
        limit: rows a dataset; `None` for all.
    """
    started = time.monotonic()
    yield "Drawing MMEB-mini, unless it is there already …"
    root = benchmark.ensure("eval", data_dir)
    results: dict[str, EvaluationResult] = {}
    similarities: dict[str, np.ndarray] = {}
    neighbours: dict[str, list[Neighbours]] = {}
    photos = load_photos()
    for mode in MODES:
        yield f"Evaluating gen2embed-mini, prompt {mode!r}, on {len(benchmark.MMEB_MINI.datasets)} datasets …"
        model = Gen2Embed(str(model_dir()), prompt_mode=mode, device="cpu", local_files_only=True)
        config = EvaluationConfig(
            data_dir=str(root / "MMEB-eval"),
            image_dir=str(root / "images"),
            output_dir=str(output_dir / mode),
            limit=limit,
            overwrite=True,
            model_name="gen2embed-mini",
            prompt_mode=mode,
            fingerprint=fingerprint(model),
        )
        results[mode] = evaluate(PrefixEncoder(model), benchmark.MMEB_MINI, config)
        similarities[mode] = _photo_similarities(model, list(photos.values()))
        neighbours[mode] = _neighbours(model, root)
    demo = DemoResult(
        _table(results),
        {mode: {score.dataset.name: score.precision_at_1 or 0.0 for score in results[mode].scores} for mode in MODES},
        photos,
        [
            (photo, caption, {mode: float(similarities[mode][i, j]) for mode in MODES})
            for i, photo in enumerate(PHOTOS)
            for j, caption in enumerate(CAPTIONS)
        ],
        neighbours,
    )
    yield "\nPrecision@1 in percent; the paper's rows are Qwen2-VL-2B on MMEB (Table IV):\n"
    yield as_text(demo.table)
    yield "\nReal photographs (scikit-learn's) and captions, similarity:\n"
    photo_rows = [[p, c, *(f"{values[mode]:.3f}" for mode in MODES)] for p, c, values in demo.similarities]
    yield as_text([["photo", "caption", *MODES], *photo_rows])
    page = write_page(demo, output_dir / "report.html")
    yield f"\nReport with pictures: {page}  ({time.monotonic() - started:.0f} s)"


def _table(results: dict[str, EvaluationResult]) -> list[list[str]]:
    """Meta-task averages, the mini model beside the paper."""
    columns = benchmark.MMEB_MINI.meta_tasks
    rows = [["", *columns, "Overall", "Digits"]]
    for mode in MODES:
        averages = average(results[mode].scores)
        digits = next((score for score in results[mode].scores if score.dataset.name == "Digits"), None)
        rows.append(
            [
                f"gen2embed-mini, {mode}",
                *(percent(averages.meta_tasks.get(task)) for task in columns),
                percent(averages.overall),
                percent(digits.precision_at_1 if digits else None),
            ]
        )
    for row in TABLE_IV:
        if row.prompt_mode in MODES:
            figures = [f"{row.figures[name]:.1f}" for name in (*columns, "overall")]
            rows.append([f"paper, {row.prompt_mode}", *figures, "–"])
    return rows


def load_photos() -> dict[str, Image.Image]:
    """The two photographs that ship with scikit-learn, 640 x 427, by name."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(name)) for name in PHOTOS}


def _photo_similarities(model: Any, images: list[Image.Image]) -> np.ndarray:
    """(photos, captions) similarities; the photographs are the queries."""
    photos = model.encode_query([{"image": image} for image in images], show_progress_bar=False)
    captions = model.encode_document([{"text": caption} for caption in CAPTIONS], show_progress_bar=False)
    return np.asarray(model.similarity(photos, captions))


def _neighbours(model: Any, root: Path) -> list[Neighbours]:
    shown = []
    for dataset in benchmark.MMEB_MINI.datasets:
        if dataset.name not in SHOWN:
            continue
        table = open_subset(root / "MMEB-eval", dataset, "test")
        rows = [row for row in read_eval_rows(table, dataset, ROWS_SHOWN) if isinstance(row, EvalRow)]
        for row in rows:
            query, *candidates = [_opened(item, root / "images") for item in (row.query, *row.candidates)]
            vectors = model.encode_document(candidates, show_progress_bar=False)
            nearest = vectors @ model.encode_query([query], show_progress_bar=False)[0]
            best = np.argsort(-nearest, kind="stable")[:NEIGHBOURS]
            found = tuple(
                (row.candidates[i].text, candidates[i].get("image"), float(nearest[i]), i == 0) for i in best.tolist()
            )
            shown.append(Neighbours(dataset.name, row.query.text, query.get("image"), found))
    return shown


def _opened(item: Any, images: Path) -> dict[str, Any]:
    opened: dict[str, Any] = {"text": item.text} if item.text or not item.images else {}
    if item.images:
        opened["image"] = open_image(item.images[0], images)
    return opened
