"""The settings of a sampling run, and what its records say of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import EncodingConfig, setting
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb import MMEB
from trainers.data.training_data import DataConfig
from trainers.saha.clusters import Variant
from trainers.sampling.records import MAX_HARD_NEGATIVES, METHODS

FORMATS = ("parquet", "official")
LABELLED = frozenset(
    name
    for benchmark in (MMEB, MMEB_MINI)
    for dataset in benchmark.datasets
    if dataset.meta_task == "Classification"
    for name in (dataset.name, dataset.train_name or dataset.name)
)
"""Classification subsets, whose candidates are labels; the official code does not re-rank those of MMEB."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DataConfig, EncodingConfig):
    """The settings of one sampling run."""

    output_dir: str = setting("folder for the sampling files; made if missing")
    embedding_dir: str = setting("folder of the vectors; empty: `embeddings` in output_dir", default="")
    method: str = setting("how negatives are chosen: saha, hn, hn-beta, in-batch", default="saha")
    variant: Variant = field(default="paper", metadata={"help": "of Algorithm 1: paper or official"})
    num_hard_negatives: int = setting("k, hard negatives a query", default=7)
    pool_multiplier: int = setting("m; saha's pool holds m k candidates", default=6)
    beta: float = setting("margin of hn-beta", default=0.02)
    file_format: str = setting("parquet, or official for the official code's JSON as well", default="parquet")

    def __post_init__(self) -> None:
        """Checks every value, so that a run never fails on one hours later.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        DataConfig.__post_init__(self)
        EncodingConfig.__post_init__(self)
        for name in ("num_hard_negatives", "pool_multiplier"):
            if getattr(self, name) < 1:
                raise Gen2EmbedError(f"{name} is {getattr(self, name)}; pass 1 or more")
        if self.num_hard_negatives > MAX_HARD_NEGATIVES:
            raise Gen2EmbedError(
                f"num_hard_negatives is {self.num_hard_negatives}; pass {MAX_HARD_NEGATIVES:,} or fewer"
            )
        if not -2 <= self.beta <= 2:
            raise Gen2EmbedError(f"beta is {self.beta}; pass a difference of two cosines, such as 0.02")
        known = {"method": METHODS, "variant": get_args(Variant), "file_format": FORMATS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise Gen2EmbedError(f"{name} is {getattr(self, name)!r}; known: {', '.join(values)}")
        if self.file_format == "official" and self.method == "in-batch":
            raise Gen2EmbedError("the official form holds hard negatives; pass --format parquet with --method in-batch")
        if not self.output_dir:
            raise Gen2EmbedError("output_dir is empty; pass a folder")

    @property
    def folder(self) -> Path:
        """The folder for the sampling files."""
        return Path(self.output_dir).expanduser()

    @property
    def images_cache(self) -> Path:
        """Where images are kept that the data embeds."""
        return self.folder / "images-cache"

    def decisive(self, subset: str) -> dict[str, Any]:
        """The settings that decide a subset's clusters; None where the method does not use one."""
        saha = self.method == "saha"
        return {
            "num_hard_negatives": 0 if self.method == "in-batch" else self.num_hard_negatives,
            "pool_multiplier": self.pool_multiplier if saha else None,
            "variant": self.variant if saha else None,
            "labelled": saha and self.variant == "official" and subset in LABELLED,
            "beta": self.beta if self.method == "hn-beta" else None,
            "resize": self.resize,
            "min_side": self.min_side,
        }


@dataclass(frozen=True)
class ModelRecord:
    """What the record says of the model.

    Attributes:
        name: Its name or path.
        revision: Its revision on the Hub, if any.
        prompt_mode: The prompt strategy.
        fingerprint: Digest of everything that decides its vectors; empty for `in-batch`, which has no use of a model.
    """

    name: str = ""
    revision: str = ""
    prompt_mode: str = ""
    fingerprint: str = ""
