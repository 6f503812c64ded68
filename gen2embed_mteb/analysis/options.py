"""The flags of `gen2embed analyze`; they are listed without loading a model's libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.config import EncodingConfig
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.embedder.prompts.strategies import TASK_STRATEGIES, strategy
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.names import Side

MMEB, MMEB_MINI = "mmeb", "mmeb-mini"
PROJECTIONS = ("umap", "pca", "none")
PICTURES, PARQUET = ("svg", "png"), "parquet"
FIGURE_4 = {MMEB: ("ImageNet-R", "MSCOCO_i2t"), MMEB_MINI: ("Digits", "Scenes_i2t")}
"""The datasets of the paper's Fig. 4, and those of MMEB-mini that resemble them."""
WORDS_OF = {MMEB: ("ImageNet-R", "OK-VQA", "MSCOCO_i2t"), MMEB_MINI: ("ColorShape", "AttributeQA", "Scenes_i2t")}
"""The datasets whose words are shown: one per kind of task."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(RowLimits, LinkOption, RemoteOption):
    """Which datasets are read."""

    benchmark: str = option("benchmark whose datasets are read", default=MMEB, choices=(MMEB, MMEB_MINI))
    data_dir: str = option("folder or hub id of its tables; mmeb-mini draws its own", default="")
    image_dir: str = option("folder or .zip archive of the images; default: beside the tables", default="")
    split: str = option("split that is read", default="test", flag="eval_split")
    subsets: tuple[str, ...] = option("datasets that are read", default=())
    limit: int | None = option("rows per dataset, from the first", default=None, least=1)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions(DataOptions):
    """Which inputs are measured."""

    text: str = option("text of one input (default, without --image and --subsets: a built-in example)", default="")
    image: str = option("image file of that input", default="")
    limit: int | None = option("rows per dataset of --subsets, from the first", default=3, least=1)
    side: Side = option("side on which inputs are encoded", default="query", choices=("query", "document"))
    max_tokens: int = option(
        "longest input; one layer's attention has heads x tokens x tokens numbers", default=4096, least=2
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, or one input and datasets are both given.
        """
        check_options(self)
        if self.subsets and (self.text or self.image):
            raise Gen2EmbedError("--subsets names inputs of datasets, --text and --image one input; leave one out")


@dataclass(frozen=True, kw_only=True)
class SpaceOptions(EncodingConfig, DataOptions):
    """What is encoded, under which prompts, and how it is drawn."""

    subsets: tuple[str, ...] = option(
        "datasets that are drawn (default: those of Fig. 4, ImageNet-R and MSCOCO_i2t; of mmeb-mini two like them)",
        default=(),
    )
    limit: int | None = option("rows per dataset, from the first", default=1000, least=1)
    prompts: tuple[str, ...] = option(
        "prompts that are compared, a panel for each", default=("none", "unime", "hierarchical")
    )
    projection: str = option(
        "how vectors get places on the map: umap as in Fig. 4, which needs the extra [analysis]; pca; or none, for "
        "the numbers alone",
        default="umap",
        choices=PROJECTIONS,
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, a prompt is unknown, named twice, or differs by dataset.
        """
        EncodingConfig.__post_init__(self)
        check_options(self)
        check_prompts(self.prompts)

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets that are drawn."""
        return self.subsets or FIGURE_4[self.benchmark]


@dataclass(frozen=True, kw_only=True)
class WordsOptions(DataOptions):
    """Which inputs are asked about, and how many tokens are shown."""

    subsets: tuple[str, ...] = option("datasets whose inputs are shown (default: one per kind of task)", default=())
    limit: int | None = option(
        "rows per dataset, from the first; each gives its query and its positive", default=2, least=1
    )
    prompts: tuple[str, ...] = option("prompts that are compared, a column for each", default=("none", "hierarchical"))
    top: int = option("tokens that are shown", default=5, least=1, most=50)
    text: str = option("text of one input, in place of datasets", default="")
    image: str = option("image file of that input", default="")

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, a prompt cannot be compared, or one input and datasets are
                both given.
        """
        check_options(self)
        check_prompts(self.prompts)
        if self.subsets and (self.text or self.image):
            raise Gen2EmbedError("--subsets names inputs of datasets, --text and --image one input; leave one out")

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets whose inputs are shown."""
        return self.subsets or WORDS_OF[self.benchmark]


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where an analysis is written, and in which forms."""

    output_dir: str = option("default: results/analyze/<model>", default="")
    formats: tuple[str, ...] = option(
        "files beside the figures in JSON: svg, png; of space also parquet, for embedding-atlas",
        default=PICTURES,
        flag="format",
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A format is unknown.
        """
        check_options(self)
        if unknown := set(self.formats) - {*PICTURES, PARQUET}:
            raise Gen2EmbedError(f"format {', '.join(sorted(unknown))} is unknown; known: svg, png, parquet")

    def folder(self, model_name: str) -> Path:
        """Return the folder that is written."""
        return Path(self.output_dir or Path("results") / "analyze" / Path(model_name).name)


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse prompts that cannot be set on a loaded model.

    Args:
        prompts: Their names.

    Raises:
        Gen2EmbedError: There is none; one is unknown, named twice, or has texts per dataset.
    """
    names = [strategy(name).name for name in prompts]
    if per_dataset := [name for name in names if name in TASK_STRATEGIES]:
        raise Gen2EmbedError(
            f"prompts has {', '.join(per_dataset)}, whose texts differ by dataset; leave it out: prompts are compared "
            "by the same words for all"
        )
    if not names or len(set(names)) < len(names):
        raise Gen2EmbedError(f"prompts is {', '.join(prompts) or 'empty'}; name each once")
