"""ShareGPT4V and Urban1K as retrieval tasks of mteb, in both directions; mteb has Flickr30K and COCO itself.

`hit_rate_at_1` is the recall at 1 of `gen2embed evaluate`. The main score is mteb's for retrieval, nDCG@10.

| variable               | value                                                          | default              |
|------------------------|----------------------------------------------------------------|----------------------|
| `SHAREGPT4V_DIR`       | the folder of share-captioner_coco_lcs_sam_1246k_1107.json     | needed               |
| `SHAREGPT4V_IMAGE_DIR` | the pictures that it names: a folder, or a .zip archive        | beside that file     |
| `URBAN1K_DIR`          | the folders caption and image, or Urban1k.zip                  | the archive, the hub |
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.timing import TimingStack

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.rows import BadRow, RowLimits, guarded
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.retrieval.datasets import SHAREGPT4V, URBAN1K, CaptionDataset, CaptionedImage, open_dataset

logger = logging.getLogger(__name__)

_CITATIONS = {"sharegpt4v": "https://arxiv.org/abs/2311.12793", "urban1k": "https://arxiv.org/abs/2403.15378"}
_COMMITS = {"sharegpt4v": "main", "urban1k": "main"}
_CATEGORIES = {"I2T": "i2t", "T2I": "t2i"}


class AbsTaskCaptionRetrieval(AbsTaskRetrieval):
    """Images with captions, in one direction.

    Attributes:
        source: The dataset.
        direction: `I2T`, captions are searched by their image, or `T2I`.
        num_errors: The number of rows that were set aside.
    """

    source: ClassVar[CaptionDataset]
    direction: ClassVar[str]
    dataset: dict[str, dict[str, Any]]
    data_loaded: bool
    num_errors: int = 0
    abstask_prompt = ""  # as in `gen2embed evaluate`: a caption is a query by itself

    def load_data(self, num_proc: int | None = None, *, timer: TimingStack | None = None, **kwargs: Any) -> None:
        """Read the dataset and check its images.

        Raises:
            DataError: Files or images are missing, or more than 0.1 % of the rows cannot be used.
        """
        if self.data_loaded:
            return
        from gen2embed_mteb.mteb_plugin.tasks.data import check_error_rate, fault_of, image_faults, items_table

        with (timer or TimingStack())("Data loading", log_message=f"Loading dataset {self.metadata.name}..."):
            rows, images, place, num_rows = _read(self.source)
            faults = image_faults({row.image for row in rows}, images)
            kept = []
            for row in rows:
                fault = fault_of(Item("", (row.image,)), faults)
                if fault:
                    logger.warning("%s: row %d was set aside: %s", self.metadata.name, row.index, fault)
                else:
                    kept.append(row)
            self.num_errors = num_rows - len(kept)
            check_error_rate(place, self.num_errors, num_rows)
            pictures = items_table([(f"i{row.index}", Item("", (row.image,))) for row in kept], "i", images, place)
            captions = items_table([(f"c{row.index}", Item(row.captions[0])) for row in kept], "t", images, place)
            queries, corpus = (pictures, captions) if self.direction == "I2T" else (captions, pictures)
            kinds = ("i", "c") if self.direction == "I2T" else ("c", "i")
            self.dataset = {
                "default": {
                    "test": {
                        "queries": queries,
                        "corpus": corpus,
                        "relevant_docs": {f"{kinds[0]}{r.index}": {f"{kinds[1]}{r.index}": 1} for r in kept},
                        "top_ranked": None,
                    }
                }
            }
        self.data_loaded = True


def _read(source: CaptionDataset) -> tuple[list[CaptionedImage], Any, str, int]:
    """Return the usable rows of a dataset, its images, where it is, and how many rows there are."""
    name = source.name.upper()
    data_dir = os.environ.get(f"{name}_DIR", "") or (source.hub_id if source is URBAN1K else "")
    if not data_dir:
        raise DataError(
            f"{source.title} needs {source.file}: name its folder in {name}_DIR, and that of its pictures in "
            f"{name}_IMAGE_DIR"
        )
    cache = Path(tempfile.gettempdir())  # nothing is written: no image is embedded in a table
    opened = open_dataset(
        source, data_dir, os.environ.get(f"{name}_IMAGE_DIR", ""), cache, follow_links=follows_links()
    )

    def make(_: int, numbered: tuple[int, Any]) -> CaptionedImage:
        return opened.made(*numbered, RowLimits())

    rows, number = [], 0
    for row in guarded(opened.rows(None), lambda _: opened.source, make):
        number += 1
        if isinstance(row, BadRow):
            logger.warning("%s: row %d was set aside: %s", row.file, row.index, row.reason)
        else:
            rows.append(row)
    return rows, opened.images, opened.source, number


def _metadata(source: CaptionDataset, direction: str) -> TaskMetadata:
    searched = "the caption of an image" if direction == "I2T" else "the image of a caption"
    kinds = "long captions by a model" if source is SHAREGPT4V else "long captions of busy street scenes"
    return TaskMetadata(
        name=f"{source.title}{direction}Retrieval",
        dataset={"path": source.hub_id, "revision": _COMMITS[source.name]},
        description=f"Search {searched} among 1,000, with {kinds}.",
        type="Any2AnyRetrieval",
        category=_CATEGORIES[direction],
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2023-01-01", "2023-12-31") if source is SHAREGPT4V else ("2024-01-01", "2024-12-31"),
        reference=_CITATIONS[source.name],
        domains=["Web", "Scene"],
        task_subtypes=["Image Text Retrieval"],
        license="cc-by-nc-4.0",
        annotations_creators="LM-generated",
        dialect=[],
        sample_creation="found",
        bibtex_citation="",
    )


def _task(source: CaptionDataset, direction: str) -> type[AbsTaskCaptionRetrieval]:
    fields = {"metadata": _metadata(source, direction), "source": source, "direction": direction}
    name = f"{source.title}{direction}Retrieval"
    return type(name, (AbsTaskCaptionRetrieval,), {**fields, "__module__": __name__})


TASKS = tuple(_task(source, direction) for source in (SHAREGPT4V, URBAN1K) for direction in ("I2T", "T2I"))
"""The task classes."""
