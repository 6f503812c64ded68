"""VLM2Vec v1 (branch `v1`): the replaced methods that turn rows into inputs.

v1 takes the backbone from the model's configuration, ignores `--model_backbone`, and encodes the distinct inputs of a
dataset in the order of a set, which depends on PYTHONHASHSEED; here they are sorted by length. v1 does not support
several processes; here each process prepares and encodes its rows of every batch, and they exchange the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import Any

from gen2embed_mteb.names import Side
from vlm2vec_adapter import BACKBONE
from vlm2vec_adapter.datasets import candidates_are_queries
from vlm2vec_adapter.scripts.engine import KEY, Sample
from vlm2vec_adapter.scripts.session import Session

NAME = "v1"
VENDORED = ("src.vlm_backbone",)


def describe_datasets(data_args: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings that decide the rows of each dataset of a run."""
    source = {"dataset_name": data_args.dataset_name, "dataset_split": data_args.dataset_split}
    return dict.fromkeys(data_args.subset_name or (), source)


def install(session: Session) -> None:
    """Add this backbone to v1's registries, and replace how its datasets return rows; `src` must be importable."""
    model_utils, model, dataset = (import_module(f"src.{name}") for name in ("model_utils", "model", "dataset"))
    import_module("src.collator")
    model_utils.MODEL2BACKBONE[BACKBONE] = BACKBONE
    model_utils.SUPPORTED_MODELS.add(BACKBONE)
    model_utils.vlm_image_tokens[BACKBONE] = model_utils.vlm_image_tokens[model_utils.PHI3V]  # the marker in the data
    model_utils.process_vlm_inputs_fns[BACKBONE] = _process_batch
    _replace_rows(dataset.EvalDataset, session)
    session.install(model.MMEBModel)


def _process_batch(model_inputs: dict[str, Any], processor: Any, max_length: int | None = None) -> dict[str, Any]:
    """Prepare the rows of a batch; v1's collator calls this, and each row knows its dataset."""
    rows = [row for group in model_inputs["text"] for row in group]
    return {KEY: rows[0].prepare(rows)}


class _Row:
    """One row, which the dataset passes to the collator."""

    __slots__ = ("dataset", "sample")

    def __init__(self, dataset: Any, sample: Sample) -> None:
        self.dataset = dataset
        self.sample = sample

    def prepare(self, rows: list[_Row]) -> Any:
        return self.dataset.prepare([row.sample for row in rows])


class _Side:
    """The session, the side and the images of a dataset of v1."""

    def __init__(self, session: Session, subset: str, text_field: str) -> None:
        self.session = session
        self.images = session.images_in(session.data_args.image_dir)
        as_query = text_field.startswith("qry") or candidates_are_queries(subset)
        self.side: Side = "query" if as_query else "document"

    def sorted_pairs(self, pairs: list[dict[str, str]]) -> list[dict[str, str]]:
        samples = [Sample.of(pair["text"], pair["img_path"]) for pair in pairs]
        return [pairs[row] for row in self.session.engine.sorted_order(self.side, samples, self.images)]

    def prepare(self, samples: list[Sample]) -> Any:
        return self.session.engine.prepare(self.side, samples, self.images)


def _replace_rows(dataset_class: Any, session: Session) -> None:
    """Sort the rows of `EvalDataset`, and let each of its items hold one row per process, so that each encodes one."""
    stock_init, stock_pairs = dataset_class.__init__, dataset_class.get_paired_data
    width = session.share.world_size

    @wraps(stock_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature(stock_init).bind(self, *args, **kwargs).arguments
        self.gen2embed = _Side(session, given["subset"], given["text_field"])
        stock_init(self, *args, **kwargs)

    @wraps(stock_pairs)
    def get_paired_data(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.gen2embed.sorted_pairs(stock_pairs(self, *args, **kwargs))

    def __len__(self: Any) -> int:
        return -(-len(self.paired_data) // width)

    def __getitem__(self: Any, item: int) -> Any:
        pairs = self.paired_data[item * width : (item + 1) * width]
        rows = [_Row(self.gen2embed, Sample.of(pair["text"], pair["img_path"])) for pair in pairs]
        return rows, None

    for replacement in (__init__, get_paired_data, __len__, __getitem__):
        setattr(dataset_class, replacement.__name__, replacement)
