"""The demo on the embedded default model: evaluation without a prompt, with the two-level prompt, and fine-tuned.

MMEB-mini is drawn, and `gen2embed-mini` is evaluated with both prompts. If the caller passes a function for it, the
model is fine-tuned and evaluated again. Two real photographs are matched with captions, and a page with images is
written. Nothing is downloaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.demo.figures import figures
from gen2embed_mteb.demo.page import DemoResult, Neighbours, page_bytes
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.paper import TABLE_IV, TABLE_VII
from gen2embed_mteb.evaluation.run_folder import UNKNOWN, check_reports
from gen2embed_mteb.evaluation.tables import as_text, percent
from gen2embed_mteb.images.decoding import open_image
from gen2embed_mteb.mini import benchmark, model_dir
from gen2embed_mteb.mini.places import evaluation_places
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.readers import EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.scoring import Averages, EvaluationResult, average
from gen2embed_mteb.mmeb.tables import open_subset
from gen2embed_mteb.storage.owned_folder import OwnedFolder

MODES = ("none", "hierarchical")
TUNED, TUNED_FOLDER = "hierarchical + SaHa", "tuned"
WRITER, PAGE, LOG = "demo", "report.html", "training.log"
"""Who writes, and the files in the output folder itself."""
_UNKNOWN: dict[str, Any] = {"fingerprint": UNKNOWN, "overwrite": True}
PHOTOS = ("china.jpg", "flower.jpg")
CAPTIONS = ("A red flower on green.", "A gray building under a blue sky.", "A handwritten seven.", "A black square.")
SHOWN = ("Scenes_t2i", "Pointing", "AttributeQA", "Digits")
"""The datasets whose first rows the report shows with their nearest candidates."""
ROWS_SHOWN, NEIGHBOURS = 3, 6


class FineTuned(NamedTuple):
    """The result of fine-tuning.

    Attributes:
        model: The saved model's folder.
        clusters: An HTML page about the training data, in or below the demo's output folder.
    """

    model: Path
    clusters: Path


FineTune = Callable[[], Generator[str, None, FineTuned]]
"""A function that fine-tunes `gen2embed-mini` and yields messages. The caller passes it, since the package that trains
depends on this one."""


class _Measured(NamedTuple):
    """The results of one model with one prompt: scores, (photos, captions) similarities, and the shown rows."""

    result: EvaluationResult
    similarities: np.ndarray
    neighbours: list[Neighbours]


def run_demo(
    output_dir: Path, data_dir: Path | None = None, limit: int | None = None, fine_tune: FineTune | None = None
) -> Iterator[str]:
    """Run the demo, and yield messages line by line.

    Args:
        output_dir: The folder for results, models and `report.html`; files of an earlier demo are replaced.
        data_dir: The folder of MMEB-mini; `None` stands for the user's cache folder.
        limit: The number of rows per dataset; `None` for all.
        fine_tune: A function that runs after the zero-shot evaluations; `None` for no fine-tuning.

    Raises:
        ForeignFileError: The output folder holds files with the names of ours that we did not write.
    """
    started = time.monotonic()
    folder = OwnedFolder(output_dir, WRITER)
    folder.check([PAGE, LOG])
    for name in (*MODES, TUNED_FOLDER):
        check_reports(EvaluationConfig(data_dir="drawn", output_dir=str(output_dir / name), **_UNKNOWN), "mmeb-mini")
    yield "Drawing MMEB-mini, unless it is there already …"
    root = benchmark.ensure("eval", data_dir)
    photos = load_photos()
    measured: dict[str, _Measured] = {}
    count = len(benchmark.MMEB_MINI.datasets)
    for mode in MODES:
        yield f"Evaluating gen2embed-mini, prompt {mode!r}, on {count} datasets …"
        model = _load(model_dir(), mode)
        measured[mode] = _measure(model, _config(root, output_dir / mode, limit, model), photos)
    yield "Drawing what the model attends to, which word it means, and where its vectors lie …"
    drawn = figures(_load(model_dir(), MODES[-1]), root, "gen2embed-mini", limit)
    tuned = None
    if fine_tune is not None:
        tuned = yield from fine_tune()
        yield f"Evaluating the tuned model, prompt {MODES[-1]!r}, on {count} datasets …"
        model = _load(tuned.model, MODES[-1])
        measured[TUNED] = _measure(model, _config(root, output_dir / TUNED_FOLDER, limit, model), photos)
    averages = {label: average(one.result.scores) for label, one in measured.items()}
    gain = _gain(averages[MODES[-1]], averages[TUNED]) if tuned else ""
    demo = DemoResult(
        _table(measured, averages),
        {
            label: {score.dataset.name: score.precision_at_1 or 0.0 for score in one.result.scores}
            for label, one in measured.items()
        },
        photos,
        [
            (photo, caption, {label: float(one.similarities[i, j]) for label, one in measured.items()})
            for i, photo in enumerate(PHOTOS)
            for j, caption in enumerate(CAPTIONS)
        ],
        {label: one.neighbours for label, one in measured.items()},
        gain,
        tuned.clusters.relative_to(output_dir).as_posix() if tuned else "",
        tuple(drawn),
    )
    yield "\nPrecision@1 in percent; the paper's rows are Qwen2-VL-2B on MMEB (Tables IV and VII):\n"
    yield as_text(demo.table)
    if gain:
        yield f"\n{gain}"
    yield "\nReal photographs (scikit-learn's) and captions, similarity:\n"
    photo_rows = [[p, c, *(f"{values[label]:.3f}" for label in measured)] for p, c, values in demo.similarities]
    yield as_text([["photo", "caption", *measured], *photo_rows])
    page = folder.write(PAGE, page_bytes(demo))
    yield f"\nReport with pictures: {page}  ({time.monotonic() - started:.0f} s)"


def _load(folder: Path, prompt_mode: str) -> Gen2Embed:
    return Gen2Embed(str(folder), prompt_mode=prompt_mode, device="cpu", local_files_only=True)


def _config(root: Path, output_dir: Path, limit: int | None, model: Gen2Embed) -> EvaluationConfig:
    places = evaluation_places(root)
    return EvaluationConfig(
        data_dir=str(places.data_dir),
        image_dir=str(places.image_dir),
        output_dir=str(output_dir),
        limit=limit,
        overwrite=True,
        model_name="gen2embed-mini",
        prompt_mode=model.prompt_mode,
        fingerprint=fingerprint(model),
    )


def _measure(model: Gen2Embed, config: EvaluationConfig, photos: dict[str, Image.Image]) -> _Measured:
    return _Measured(
        evaluate(PrefixEncoder(model), benchmark.MMEB_MINI, config),
        _photo_similarities(model, list(photos.values())),
        _neighbours(model, config),
    )


def _table(measured: dict[str, _Measured], averages: dict[str, Averages]) -> list[list[str]]:
    """Return the table of averages, of the mini model and of the paper."""
    columns = benchmark.MMEB_MINI.meta_tasks
    rows = [["", *columns, "IND", "OOD", "Overall", "Digits"]]
    for label, one in measured.items():
        found = averages[label]
        digits = next((score for score in one.result.scores if score.dataset.name == "Digits"), None)
        rows.append(
            [
                f"gen2embed-mini, {label}",
                *(percent(found.meta_tasks.get(task)) for task in columns),
                *(percent(figure) for figure in (found.ind, found.ood, found.overall)),
                percent(digits.precision_at_1 if digits else None),
            ]
        )
    beside = {row.prompt_mode: row for row in TABLE_IV if row.prompt_mode in MODES}
    beside[TUNED] = next(row for row in TABLE_VII if row.label == "SaHa, k = 7")
    for label in measured:
        figures = [beside[label].figures.get(name) for name in (*columns, "ind", "ood", "overall")]
        shown = ["–" if figure is None else f"{figure:.1f}" for figure in figures]
        rows.append([f"paper, {label}", *shown, "–"])
    return rows


def _gain(before: Averages, after: Averages) -> str:
    """Return the differences of the averages that both have, in percentage points."""
    differences = [
        f"{name} {round(100 * (now - then), 1) + 0.0:+.1f}"
        for name, then, now in (
            ("overall", before.overall, after.overall),
            ("in domain", before.ind, after.ind),
            ("out of domain", before.ood, after.ood),
        )
        if then is not None and now is not None
    ]
    return f"Gain over zero-shot, the same prompt, in points: {', '.join(differences)}"


def load_photos() -> dict[str, Image.Image]:
    """Return the two photographs that ship with scikit-learn, 640 x 427, by name."""
    from sklearn.datasets import load_sample_image

    return {name: Image.fromarray(load_sample_image(name)) for name in PHOTOS}


def _photo_similarities(model: Any, images: list[Image.Image]) -> np.ndarray:
    """Return the (photos, captions) similarities; the photographs are the queries."""
    photos = model.encode_query([{"image": image} for image in images], show_progress_bar=False)
    captions = model.encode_document([{"text": caption} for caption in CAPTIONS], show_progress_bar=False)
    return np.asarray(model.similarity(photos, captions))


def _neighbours(model: Any, config: EvaluationConfig) -> list[Neighbours]:
    data_dir, images = Path(config.data_dir), Path(config.image_dir)
    count = min(ROWS_SHOWN, config.limit or ROWS_SHOWN)
    shown = []
    for dataset in benchmark.MMEB_MINI.datasets:
        if dataset.name not in SHOWN:
            continue
        table = open_subset(data_dir, dataset, "test")
        rows = [row for row in read_eval_rows(table, dataset, count) if isinstance(row, EvalRow)]
        for row in rows:
            query, *candidates = [_opened(item, images) for item in (row.query, *row.candidates)]
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
