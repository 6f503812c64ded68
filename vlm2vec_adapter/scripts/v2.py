"""VLM2Vec V2 (branch `main`): the replaced methods that turn rows into inputs.

V2 uses `--model_backbone`, composes the texts of MMEB itself from instruction and text, and shares the rows among
processes in contiguous parts. Its collator knows the side but not the dataset, so the present dataset is remembered
when it is opened; V2's loop handles one dataset after the other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side
from vlm2vec_adapter import BACKBONE
from vlm2vec_adapter.datasets import candidates_are_queries
from vlm2vec_adapter.scripts.engine import KEY, Sample
from vlm2vec_adapter.scripts.session import Session

NAME = "v2"
VENDORED = ("src.model.vlm_backbone", "src.model.baseline_backbone")

MARKER = "<|image_1|>"
ROOTS = ("image_root", "video_root", "frame_root", "clip_root", "data_path")
"""The keys of a dataset's configuration that name only its place."""


def describe_datasets(data_args: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings that decide the rows of each dataset of a run."""
    import yaml

    configuration = yaml.safe_load(Path(data_args.dataset_config).read_text(encoding="utf-8"))
    return {
        name: {key: value for key, value in task.items() if key not in ROOTS} for name, task in configuration.items()
    }


def install(session: Session) -> None:
    """Add this backbone to V2's registries, and replace how its collator reads rows; `src` must be importable."""
    processor, model = import_module("src.model.processor"), import_module("src.model.model")
    collator = import_module("src.data.collator.eval_collator")
    datasets = import_module("src.data.eval_dataset.base_eval_dataset")
    processor.MODEL2BACKBONE[BACKBONE] = BACKBONE
    processor.SUPPORTED_MODELS.add(BACKBONE)
    processor.VLM_IMAGE_TOKENS[BACKBONE] = MARKER  # the marker in the data
    processor.VLM_VIDEO_TOKENS[BACKBONE] = ""
    rows = _Rows(session)
    rows.replace(datasets, collator.MultimodalEvalDataCollator)
    session.install(model.MMEBModel)


class _Rows:
    """The rows of the present dataset."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._root: str | None = None
        self._candidates_as_queries = False

    def replace(self, datasets: Any, collator_class: Any) -> None:
        """Replace V2's dataset functions and its collator, so that rows are sorted and read here."""
        registry = datasets.AutoEvalPairDataset
        stock_instantiate, stock_candidates = registry.instantiate.__func__, datasets.generate_cand_dataset

        @wraps(stock_instantiate)
        def instantiate(cls: Any, *args: Any, **kwargs: Any) -> Any:
            self._candidates_as_queries = candidates_are_queries(kwargs.get("dataset_name", ""))
            self._root = kwargs.get("image_root")
            queries, corpus = stock_instantiate(cls, *args, **kwargs)
            return self._sorted(queries, "query"), corpus

        @wraps(stock_candidates)
        def generate_cand_dataset(*args: Any, **kwargs: Any) -> Any:
            return self._sorted(stock_candidates(*args, **kwargs), "cand")

        def __call__(collator: Any, examples: list[dict[str, Any]]) -> Any:
            kind = "query" if collator.encode_side == "qry" else "cand"
            samples = [self._sample(example, kind) for example in examples]
            images = self._session.images_in(self._root)
            batch = self._session.engine.prepare(self._side(kind), samples, images)
            return {KEY: batch}, [example["dataset_infos"] for example in examples]

        registry.instantiate = classmethod(instantiate)
        datasets.generate_cand_dataset = generate_cand_dataset
        collator_class.__call__ = __call__

    def _side(self, kind: str) -> Side:
        return "query" if kind == "query" or self._candidates_as_queries else "document"

    def _sorted(self, dataset: Any, kind: str) -> Any:
        """Return the dataset with the longest rows first; with several processes, first in each one's part."""
        columns = dataset.select_columns([f"{kind}_text", f"{kind}_image"])
        samples = [self._sample(row, kind) for row in columns]
        images = self._session.images_in(self._root)
        order = self._session.engine.sorted_order(self._side(kind), samples, images)
        width = self._session.share.world_size
        return dataset.select([row for rank in range(width) for row in order[rank::width]])

    def _sample(self, example: dict[str, Any], kind: str) -> Sample:
        text, image = example[f"{kind}_text"][0], example[f"{kind}_image"][0]
        if image is None:
            return Sample.of(text, None)
        paths, encoded = image.get("paths") or [], image.get("bytes") or []
        if len(paths) > 1 or len(encoded) > 1:
            raise Gen2EmbedError(
                f"a row of {max(len(paths), len(encoded))} frames: Gen2Embed encodes texts and single images; "
                "run the datasets of experiments/public/eval/image.yaml"
            )
        if encoded and encoded[0] is not None:
            return Sample.of(text, encoded[0])
        path = paths[0] if paths else None
        if path is None or self._root is None:
            return Sample.of(text, path)
        # V2 puts the folder before every path, even before the empty path of a row without an image.
        relative = os.path.relpath(path, self._root)
        return Sample.of(text, None if relative == "." else relative)
