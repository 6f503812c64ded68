"""The settings of a sampling run, and what its records say about the model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.config import EncodingConfig
from gen2embed_mteb.distributed.options import EngineOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import option
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb import MMEB
from trainers.data.config import DataConfig
from trainers.saha.approximate_search import EXACT, IvfSettings
from trainers.saha.clusters import Variant
from trainers.saha.search import Backend
from trainers.sampling.records import MAX_HARD_NEGATIVES, METHODS

FORMATS = ("parquet", "official")
LABELLED = frozenset(
    name
    for benchmark in (MMEB, MMEB_MINI)
    for dataset in benchmark.datasets
    if dataset.meta_task == "Classification"
    for name in (dataset.name, dataset.train_name or dataset.name)
)
"""Classification subsets, whose candidates are labels; the official code does not re-rank the candidates of MMEB's."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DataConfig, EncodingConfig, EngineOptions):
    """The settings of one sampling run."""

    output_dir: str = option("folder for the files, one Parquet file per subset; made if missing", needs="a folder")
    embedding_dir: str = option("folder for vectors, which runs can share; default: in output_dir", default="")
    method: str = option("how negatives are chosen", default="saha", choices=METHODS)
    variant: Variant = option("variant of Algorithm 1", default="paper", choices=get_args(Variant))
    num_hard_negatives: int = option("k, the hard negatives per query", default=7, least=1, most=MAX_HARD_NEGATIVES)
    pool_multiplier: int = option("m: saha's pool holds m k candidates", default=6, least=1)
    beta: float = option("margin of hn-beta, a difference of two cosines", default=0.02, least=-2, most=2)
    file_format: str = option(
        "official: write the official code's JSON too", default="parquet", flag="format", choices=FORMATS
    )
    search_backend: Backend = option(
        "what searches nearest neighbours; an exact search has the same result with each; auto is torch",
        default="auto",
        choices=get_args(Backend),
    )
    search: str = option(
        "exact; or ivf:NLIST,NPROBE with --search_backend faiss: approximate, its recall is measured and recorded",
        default=EXACT,
    )
    search_threshold: int = option(
        "candidates from which on a subset is searched as --search says; smaller ones are searched exactly",
        default=100_000,
        least=1,
    )
    search_block: int = option(
        "exact search in jobs of so many queries and candidates, kept in output_dir/search and shared by the workers "
        "of --engine ray or the processes of torchrun (0: this process searches)",
        default=0,
        least=0,
    )

    def __post_init__(self) -> None:
        """Check every value, so that a run does not fail on one hours later.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        DataConfig.__post_init__(self)
        EncodingConfig.__post_init__(self)
        self.check_engine()
        if self.search_backend == "faiss" and importlib.util.find_spec("faiss") is None:
            raise Gen2EmbedError(
                "search_backend is 'faiss', which is not installed: pip install 'gen2embed[cpu]' (or [gpu])"
            )
        if self.ivf is not None and self.search_backend != "faiss":
            raise Gen2EmbedError(f"search is {self.search!r}, which FAISS does; pass --search_backend faiss, too")
        if self.ivf is not None and self.search_block:
            raise Gen2EmbedError("search_block is of an exact search; leave it out with --search ivf")
        if self.file_format == "official" and self.method == "in-batch":
            raise Gen2EmbedError("the official form holds hard negatives; pass --format parquet with --method in-batch")

    @property
    def ivf(self) -> IvfSettings | None:
        """The settings of an approximate search; None if the search is exact."""
        return IvfSettings.named(self.search)

    @property
    def folder(self) -> Path:
        """The folder for the sampling files."""
        return Path(self.output_dir).expanduser()

    @property
    def images_cache(self) -> Path:
        """The folder for images that the data embeds."""
        return self.folder / "images-cache"

    def decisive(self, subset: str) -> dict[str, Any]:
        """Return the settings that decide a subset's clusters; None where the method does not use one."""
        saha = self.method == "saha"
        return {
            "num_hard_negatives": 0 if self.method == "in-batch" else self.num_hard_negatives,
            "pool_multiplier": self.pool_multiplier if saha else None,
            "variant": self.variant if saha else None,
            "labelled": saha and self.variant == "official" and subset in LABELLED,
            "beta": self.beta if self.method == "hn-beta" else None,
            "resize": self.resize,
            "min_side": self.min_side,
            **self.orientation(),
            **({} if self.ivf is None else {"search": self.search, "search_threshold": self.search_threshold}),
        }


@dataclass(frozen=True)
class ModelRecord:
    """What a record says about the model.

    Attributes:
        name: The model's name or path.
        revision: Its revision on the Hub, if any.
        prompt_mode: The prompt strategy.
        fingerprint: The digest of everything that decides its vectors; empty for `in-batch`, which uses no model.
        readout: The name of its readout.
    """

    name: str = ""
    revision: str = ""
    prompt_mode: str = ""
    fingerprint: str = ""
    readout: str = "last"
