"""MMEB and MMEB-mini as retrieval tasks of mteb: every query ranks its own candidates.

Any model of mteb can run them. The scores are mteb's own metrics, MMEB's Precision@1 by the official rule (the main
score), and Precision@1 by the strict rule; both rules are those of `mmeb/scoring.py`.

| variable         | value                                     | default           |
|------------------|-------------------------------------------|-------------------|
| `MMEB_EVAL_DIR`  | MMEB's tables: a folder, or a hub id      | the hub, pinned   |
| `MMEB_IMAGE_DIR` | their images: a folder, or a .zip archive | beside the tables |
| `MMEB_MINI_DIR`  | the folder of MMEB-mini                   | the user's cache  |
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.timing import TimingStack

from gen2embed_mteb.evaluation.run import find_images
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.mini.places import evaluation_places
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.scoring import DatasetScore, RowScore, warn_about_ties
from gen2embed_mteb.mmeb.tables import DataError, open_subset
from gen2embed_mteb.mteb_plugin.names import BENCHMARKS
from gen2embed_mteb.mteb_plugin.tasks.task_metadata import (
    HUB_ID,
    HUB_REVISION,
    MAIN_SCORE,
    STRICT_SCORE,
    mini_metadata,
    mmeb_metadata,
)

EVAL_VARIABLE, IMAGE_VARIABLE, MINI_VARIABLE = "MMEB_EVAL_DIR", "MMEB_IMAGE_DIR", "MMEB_MINI_DIR"


class AbsTaskMMEB(AbsTaskRetrieval):
    """A dataset of MMEB's form.

    Attributes:
        info: The dataset.
        variable: The environment variable that names its data.
        num_errors: The number of rows that were set aside, by split.
    """

    info: ClassVar[DatasetInfo]
    variable: ClassVar[str]
    dataset: dict[str, dict[str, Any]]
    data_loaded: bool
    _top_k: int
    abstask_prompt = ""  # the texts contain their instructions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create the task; the arguments are those of mteb's class."""
        super().__init__(*args, **kwargs)
        self.num_errors: dict[str, int] = {}

    def load_data(self, num_proc: int | None = None, *, timer: TimingStack | None = None, **kwargs: Any) -> None:
        """Read the dataset's tables and check its images.

        Raises:
            DataError: Tables or images are missing or damaged; the message names them and the remedy.
        """
        if self.data_loaded:
            return
        from gen2embed_mteb.mteb_plugin.tasks.data import retrieval_split

        self.dataset = {"default": {}}
        with (timer or TimingStack())("Data loading", log_message=f"Loading dataset {self.metadata.name}..."):
            for split in self.eval_splits:
                data_dir, images = self._locate()
                revision = HUB_REVISION if data_dir == HUB_ID else None
                try:
                    table = open_subset(data_dir, self.info, split, revision)
                except DataError as error:
                    raise DataError(f"{error} (in mteb, the variable {self.variable} says where)") from error
                read, self.num_errors[split] = retrieval_split(table, self.info, images)
                self.dataset["default"][split] = read
                # mteb cuts rankings at its largest k, 1,000; the rank of the positive needs all candidates.
                self._top_k = max(self._top_k, *map(len, read["top_ranked"].values()))
        self.data_loaded = True

    def convert_to_reranking(self, top_ranked_path: str | Path, top_k: int = 10) -> Self:
        """Take the best candidates of an earlier run's predictions as the candidates of each query.

        Args:
            top_ranked_path: The file or folder of the predictions.
            top_k: How many per query.
        """
        self.load_data()  # which raises `_top_k` to the longest list of candidates
        return super().convert_to_reranking(top_ranked_path, top_k)

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Any,
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """Return MMEB's figures: both kinds of Precision@1 in [0, 1], and the numbers of rows scored and set aside."""
        rows = [_row_score(next(iter(qrels[query])), ranked) for query, ranked in results.items()]
        score = DatasetScore(self.info, tuple(rows), self.num_errors.get(hf_split, 0))
        warn_about_ties(score)
        return {
            MAIN_SCORE: score.precision_at_1 or 0.0,
            STRICT_SCORE: score.precision_at_1_strict or 0.0,
            "num_queries": float(len(rows)),
            "num_errors": float(score.num_errors),
        }

    @abstractmethod
    def _locate(self) -> tuple[str, ImageSource]:
        """Return the folder or hub id of the tables, and the images."""


class AbsTaskMMEBEval(AbsTaskMMEB):
    """A dataset of MMEB, from a folder or from the hub."""

    variable = EVAL_VARIABLE

    def _locate(self) -> tuple[str, ImageSource]:
        data_dir = os.environ.get(EVAL_VARIABLE) or HUB_ID
        image_dir = os.environ.get(IMAGE_VARIABLE, "")
        if Path(data_dir).expanduser().is_dir() or image_dir:
            try:
                return data_dir, find_images(data_dir, image_dir)
            except FileNotFoundError as error:
                raise DataError(f"{error} (in mteb, the variable {IMAGE_VARIABLE} says where)") from error
        if data_dir != HUB_ID:
            raise DataError(
                f"{EVAL_VARIABLE}={data_dir} is no folder; name one, or unset it to read {HUB_ID} from the hub. With a "
                f"hub id of your own, name the folder or .zip of its images in {IMAGE_VARIABLE}"
            )
        from huggingface_hub import hf_hub_download

        return HUB_ID, ImageSource(hf_hub_download(HUB_ID, "images.zip", repo_type="dataset", revision=HUB_REVISION))


class AbsTaskMMEBMini(AbsTaskMMEB):
    """A dataset of MMEB-mini, which is drawn on first use."""

    variable = MINI_VARIABLE

    def _locate(self) -> tuple[str, ImageSource]:
        root = ensure("eval", mini_root())
        places = evaluation_places(root)
        return str(places.data_dir), ImageSource(places.image_dir)


def mini_root() -> Path | None:
    """Return the folder of MMEB-mini that `MMEB_MINI_DIR` names; None stands for the user's cache."""
    said = os.environ.get(MINI_VARIABLE)
    return Path(said).expanduser() if said else None


def _row_score(positive: str, ranked: dict[str, float]) -> RowScore:
    """Return the outcome of a row from the scores of its distinct candidates.

    In two-stage reranking the positive may not be among the best of the first stage.
    """
    if positive not in ranked:
        return RowScore(len(ranked), strict=False)
    best = ranked[positive]
    others = [score for name, score in ranked.items() if name != positive]
    return RowScore(sum(score > best for score in others), all(score < best for score in others))


_KINDS = {"MMEB": (AbsTaskMMEBEval, mmeb_metadata), "MMEB-mini": (AbsTaskMMEBMini, mini_metadata)}


def _task(benchmark: str, dataset: DatasetInfo) -> type[AbsTaskMMEB]:
    base, metadata = _KINDS[benchmark]
    name = f"{benchmark}_{dataset.name}".replace("-", "_")
    return type(name, (base,), {"metadata": metadata(dataset), "info": dataset, "__module__": __name__})


TASKS: dict[str, tuple[type[AbsTaskMMEB], ...]] = {
    name: tuple(_task(name, dataset) for dataset in benchmark.datasets) for name, benchmark in BENCHMARKS.items()
}
"""The task classes of every benchmark, in its order."""
