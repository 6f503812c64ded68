"""The flags of `gen2embed train` for the model and the data; `recipe.py` and the libraries have the other flags."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.config import FileOptions, ModelName, PromptOptions, ReadoutOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_number, option
from gen2embed_mteb.images.options import REMOTE_HELP, LinkOption
from gen2embed_mteb.images.remote import require_allowed_names
from trainers.batches.entries import EXPLICIT
from trainers.recipe import Recipe

BENCHMARKS = ("", "mmeb-mini", "mmeb")
DTYPES = ("", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe, LinkOption, ModelName, PromptOptions, ReadoutOptions, FileOptions):
    """Which model is trained, on which data; the training arguments are in `SahaTrainingArguments`."""

    processed_data_path: str = option(
        "folder that `gen2embed sample` wrote, or one of its files", needs="a folder that gen2embed sample wrote"
    )
    data_dir: str = option("the training pairs; default: where they were sampled", default="")
    image_dir: str = option("folder or .zip of their images; default: where they were sampled", default="")
    remote_images: list[str] = option(REMOTE_HELP, default_factory=list)
    subsets: list[str] = option("subsets to train on; default: all that were sampled", default_factory=list)
    num_hard_negatives: int | None = option(
        "k: with --loss unime, how many negatives a query has (default: 8); else what the sampling files must have "
        "(default: any)",
        default=None,
    )
    explicit_negatives: int = option(
        "how many explicit negatives of a row are used at most, its first ones; they are added to mined ones",
        default=EXPLICIT,
        least=0,
    )
    mix_subsets: bool = option("whether a batch mixes clusters of several subsets", default=True)
    max_length: int = option("longest training input in tokens", default=1024, least=1)
    dtype: str = option(
        "type of the frozen weights; default: bfloat16 on a GPU with --bf16, else float32", default="", choices=DTYPES
    )
    eval_benchmark: str = option("benchmark to evaluate on during training", default="", choices=BENCHMARKS)
    eval_data_dir: str = option("folder or hub id of its tables; mmeb-mini draws its own", default="")
    eval_image_dir: str = option("folder or .zip of its images; default: beside the tables", default="")
    eval_subsets: list[str] = option("datasets of that benchmark; default: all", default_factory=list)
    eval_limit: int | None = option("rows per dataset, from the first (default: all)", default=None, least=1)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        super().__post_init__()
        require_allowed_names(self.remote_images)
        if self.eval_benchmark == "mmeb" and not self.eval_data_dir:
            raise Gen2EmbedError("eval_data_dir is needed for eval_benchmark mmeb; pass a folder or hub id")
        if self.loss == "unime" and self.num_hard_negatives is not None:
            check_number("num_hard_negatives", self.num_hard_negatives, 1)

    @property
    def sampled_k(self) -> int | None:
        """The k that the sampling files must have; None: any."""
        return None if self.loss == "unime" else self.num_hard_negatives
