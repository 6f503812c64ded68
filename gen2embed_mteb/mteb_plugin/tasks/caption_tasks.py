"""SugarCrepe++ and SugarCrepe++-mini as compositionality tasks of mteb, with one subset per set.

Captions are passed to the model unchanged. The text that Gen2Embed puts before them (`Find me an image that matches …`)
is the instruction of its own encoder for compositionality tasks, so that other models do not get it.

| variable               | value                                               | default           |
|------------------------|-----------------------------------------------------|-------------------|
| `SUGARCREPE_PLUS_DIR`  | SugarCrepe++'s JSON files                           | the hub, pinned   |
| `SUGARCREPE_IMAGE_DIR` | COCO's val2017 images: a folder, or a .zip archive  | needed            |
| `MMEB_MINI_DIR`        | the folder of SugarCrepe++-mini                     | the user's cache  |
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.timing import TimingStack

from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.mini.places import crepe_places
from gen2embed_mteb.mmeb.tables import DataError
from gen2embed_mteb.mteb_plugin.tasks.mmeb_tasks import mini_root
from gen2embed_mteb.mteb_plugin.tasks.task_metadata import (
    SUGARCREPE_PLUS_HUB_ID,
    SUGARCREPE_PLUS_HUB_REVISION,
    sugarcrepe_plus_metadata,
)
from gen2embed_mteb.sugarcrepe.evaluate import read_records, record_items, set_file
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_PLUS_BENCHMARK as BENCHMARK
from gen2embed_mteb.sugarcrepe.scoring import SetScore, score_record

logger = logging.getLogger(__name__)

JSON_VARIABLE, IMAGE_VARIABLE = "SUGARCREPE_PLUS_DIR", "SUGARCREPE_IMAGE_DIR"


class SugarCrepePlusPlus(AbsTaskImageTextPairClassification):
    """SugarCrepe++: both captions are compared with the negative, by image (ITT) and as texts (TOT)."""

    metadata = sugarcrepe_plus_metadata("SugarCrepe++", mini=False)
    data_loaded: bool
    images_column_names = "image"
    texts_column_names = BENCHMARK.captions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the task; the arguments are those of mteb's class."""
        super().__init__(*args, **kwargs)
        self.num_errors: dict[str, int] = {}  # the number of records that were set aside, by set

    def load_data(self, num_proc: int | None = None, *, timer: TimingStack | None = None, **kwargs: Any) -> None:
        """Read the sets; records that cannot be used are logged and set aside.

        Raises:
            DataError: Files or images are missing, or more than 0.1 % of a set cannot be used; the message names the
                remedy.
        """
        if self.data_loaded:
            return
        self.dataset = {}
        with (timer or TimingStack())("Data loading", log_message=f"Loading dataset {self.metadata.name}..."):
            json_dir, images = self._locate()
            for name in self.hf_subsets:
                file = set_file(json_dir, BENCHMARK, name)
                table, self.num_errors[name] = _table(file, read_records(file, BENCHMARK), images)
                self.dataset[name] = {"test": table}
        self.data_loaded = True

    def _evaluate_subset(
        self,
        model: Any,
        data_split: Dataset,
        *,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Any,
        prediction_folder: Path | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, float]:
        """Encode captions and images, and score every record by the rules of `sugarcrepe/scoring.py`."""

        def encode(columns: Dataset) -> np.ndarray:
            loader = create_dataloader(columns, task_metadata=self.metadata, num_proc=num_proc, **encode_kwargs)
            names = {"task_metadata": self.metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            rows = np.asarray(model.encode(loader, **names, **encode_kwargs), dtype=np.float32)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

        texts = [row[column] for row in data_split.select_columns(BENCHMARK.captions) for column in BENCHMARK.captions]
        captions = encode(Dataset.from_dict({"text": texts})).reshape(len(data_split), len(BENCHMARK.captions), -1)
        images = encode(data_split.select_columns(["image"]))
        hits: dict[str, list[bool]] = {task: [] for task in BENCHMARK.tasks}
        ties: dict[str, list[bool]] = {task: [] for task in BENCHMARK.tasks}
        for image, record in zip(images, captions, strict=True):
            for task, (hit, tie) in zip(BENCHMARK.tasks, score_record(image, record), strict=True):
                hits[task].append(hit)
                ties[task].append(tie)
        if prediction_folder:
            self._save_task_predictions(hits, model, prediction_folder, hf_subset=hf_subset, hf_split=hf_split)
        score = SetScore(hf_subset, hits, ties, self.num_errors.get(hf_subset, 0))
        figures = {f"accuracy_{task}": score.accuracy(task) or 0.0 for task in BENCHMARK.tasks}
        return {**figures, "num_queries": float(score.num_scored), "num_errors": float(score.num_errors)}

    def _locate(self) -> tuple[Path, ImageSource]:
        """Return the folder of the JSON files, and the images."""
        image_dir = os.environ.get(IMAGE_VARIABLE, "")
        if not image_dir:
            raise DataError(
                f"{self.metadata.name} needs COCO's val2017 images: name their folder or .zip in {IMAGE_VARIABLE}"
            )
        json_dir = os.environ.get(JSON_VARIABLE)
        if not json_dir:
            from huggingface_hub import snapshot_download

            json_dir = snapshot_download(
                SUGARCREPE_PLUS_HUB_ID,
                repo_type="dataset",
                revision=SUGARCREPE_PLUS_HUB_REVISION,
                allow_patterns=["data/*.json"],
            )
        return Path(json_dir), ImageSource(Path(image_dir).expanduser(), follow_links=follows_links())


class SugarCrepePlusPlusMini(SugarCrepePlusPlus):
    """SugarCrepe++-mini, which is drawn on first use."""

    metadata = sugarcrepe_plus_metadata("SugarCrepe++-mini", mini=True)

    def _locate(self) -> tuple[Path, ImageSource]:
        root = ensure("crepe", mini_root())
        places = crepe_places(root, plus=True)
        return places.data_dir, ImageSource(places.image_dir)


TASKS = (SugarCrepePlusPlus, SugarCrepePlusPlusMini)


def _table(file: Path, records: list[Any], images: ImageSource) -> tuple[Dataset, int]:
    """Return the usable records of a set (`image` and the caption columns), and the number of unusable ones."""
    from gen2embed_mteb.mteb_plugin.tasks.data import SourcedImage, check_error_rate

    columns: dict[str, list[str]] = {column: [] for column in ("image", *BENCHMARK.captions)}
    for number, record in enumerate(records):
        try:
            record_items(record, BENCHMARK)
            images.open(record["filename"])
        except (ValueError, ImageError) as error:
            logger.warning("%s: record %d was set aside: %s", file, number, error)
            continue
        columns["image"].append(record["filename"])
        for caption in BENCHMARK.captions:
            columns[caption].append(record[caption])
    num_errors = len(records) - len(columns["image"])
    check_error_rate(str(file), num_errors, len(records))
    texts = {caption: Value("string") for caption in BENCHMARK.captions}
    features = Features({"image": SourcedImage(source=str(images.path)), **texts})
    return Dataset.from_dict(columns, features=features), num_errors
