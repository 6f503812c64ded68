"""The flags of `gen2embed table`, and the settings that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from gen2embed_mteb.config import LAYOUTS
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.paper_tables.published import NAMES

TRAINED = ("V", "VII", "VIII")
"""The tables whose rows are fine-tuned models."""
RAW = "raw"
"""The name in `--prompts` of MMEB's text alone, without a turn and without a prompt: UniME's way on MMEB."""
PROMPTS = {
    "II": ("none", "hierarchical"),
    "VI": ("hierarchical",),
    "unime-mmeb": (RAW, "hierarchical"),
    "unime-diverse": ("unime", "hierarchical"),
}
"""The prompts of our rows, in the tables whose rows are not prompts themselves."""

_ONLY = {
    "prompts": tuple(PROMPTS),
    "checkpoint": ("V", "VI"),
    "plus_data_dir": ("VI",),
}
_DRAWN = ("image_dir", "plus_data_dir", "train_data_dir", "train_image_dir")
"""The places that `--mini` draws."""


@dataclass(frozen=True)
class Training:
    """How the models of one table are trained; the defaults are the paper's.

    Attributes:
        num_epochs: Passes over the clusters.
        max_steps: Optimizer steps of SaHa in place of `num_epochs`; the others take as many as see the same pairs.
        batch_size: Pairs per step of SaHa; in-batch has half as many, hard negatives an eighth, as in Table VII.
        learning_rate: The peak learning rate.
        warmup_steps: Steps of warm-up; None for a sixth of all steps.
        lora_dropout: Dropout on the adapter's input.
        sub_batch_size: Pairs in memory at a time.
        variant: The variant of Algorithm 1.
        train_limit: Training pairs per subset; None for all.
        resize: How training images are resized.
    """

    num_epochs: float = 1.5
    max_steps: int | None = None
    batch_size: int = 2048
    learning_rate: float = 5e-5
    warmup_steps: int | None = 100
    lora_dropout: float = 0.1
    sub_batch_size: int = 16
    variant: str = "official"
    train_limit: int | None = None
    resize: str = "square-448"


MINI_TRAINING = Training(
    max_steps=24,
    batch_size=64,
    learning_rate=1e-3,
    warmup_steps=None,
    lora_dropout=0.0,
    train_limit=600,
    resize="processor",
)
"""The settings for `gen2embed-mini`, a thousand times smaller than the paper's model: those of `gen2embed demo`."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a user can change of `Training`."""

    train_data_dir: str = option("MMEB-train, for V, VII and VIII: folder or hub id", default="")
    train_image_dir: str = option("its images: folder or .zip; default: beside the tables", default="")
    train_limit: int | None = option(
        "training pairs per subset, from the first, at least a cluster of 16 (default: all; with --mini 600)",
        default=None,
        least=16,
    )
    num_epochs: float | None = option("passes over the clusters (default: 1.5)", default=None, least=0)
    max_steps: int | None = option(
        "optimizer steps of SaHa in place of --num_epochs; the other rows take as many as see the same pairs "
        "(default: none; with --mini 24)",
        default=None,
        least=1,
    )
    train_batch_size: int | None = option(
        "pairs per step of SaHa; in-batch has half as many, hard negatives an eighth, as in the paper (default: 2048; "
        "with --mini 64)",
        default=None,
        least=16,
    )
    learning_rate: float | None = option(
        "peak learning rate of training (default: 5e-5; with --mini 1e-3)", default=None, least=0
    )
    sub_batch_size: int | None = option("pairs in memory at a time in training (default: 16)", default=None, least=1)
    variant: str | None = option(
        "variant of Algorithm 1 (default: official, which made the paper's figures)",
        default=None,
        choices=("paper", "official"),
    )


@dataclass(frozen=True, kw_only=True)
class TableOptions(TrainingOptions, LinkOption, RemoteOption):
    """What `table` is asked for, beside how a model is loaded and encodes."""

    table: str = option(f"the table: {', '.join(NAMES)}", positional=True)
    model_name: tuple[str, ...] = option(
        "models of our rows: hub ids, directories or short names (default: gen2embed; with --mini gen2embed-mini; none "
        "where --checkpoint is given)",
        default=(),
        aliases=["model_name_or_path"],
    )
    checkpoint: tuple[str, ...] = option(
        "fine-tuned models that V and VI evaluate as they are, beside or instead of --model_name", default=()
    )
    prompts: tuple[str, ...] = option(
        "prompts of our rows in II, VI and UniME's tables; raw: MMEB's text alone, in no turn (default: none "
        "hierarchical in II, hierarchical in VI, raw hierarchical and unime hierarchical in UniME's)",
        default=(),
    )
    data_dir: str = option(
        "folder or hub id of the evaluation data: MMEB-eval; for VI SugarCrepe's JSON files; with --mini, where the "
        "small benchmarks are kept",
        default="",
    )
    image_dir: str = option("folder or .zip of its images; default: beside the tables", default="")
    plus_data_dir: str = option("for VI: SugarCrepe++'s JSON files, whose images are those of --image_dir", default="")
    output_dir: str = option(
        "folder for runs and tables; the tables share runs in it (default: results/tables, with --mini "
        "results/tables-mini)",
        default="",
    )
    layout: str = option("image layout in the prompt", default="native", choices=LAYOUTS)
    mini: bool = option("evaluate and train on the embedded benchmarks, which are drawn", default=False)
    limit: int | None = option("evaluation rows per dataset, from the first (default: all)", default=None, least=1)
    dry_run: bool = option("say what would be run, and run nothing", default=False)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, is missing, or would have no effect on this table.
        """
        check_options(self)
        self.check_remote()
        if self.table not in NAMES:
            raise Gen2EmbedError(f"there is no table {self.table!r}; known: {', '.join(NAMES)}")
        used = dict(_ONLY) | {field.name: TRAINED for field in fields(TrainingOptions)}
        for name, tables in used.items():
            if getattr(self, name) and self.table not in tables:
                raise Gen2EmbedError(
                    f"{name} is for table {', '.join(tables)}, and would have no effect on {self.table}; leave it out"
                )
        self._check_places()
        for mode in self.prompts:
            if mode != RAW:
                strategy(mode)
        if len(set(self.prompts)) < len(self.prompts):
            raise Gen2EmbedError(f"prompts is {', '.join(self.prompts)}; name each once")
        if self.max_steps is not None and self.num_epochs is not None:
            raise Gen2EmbedError("max_steps and num_epochs both say how long training is; pass one of them")
        if self.train_batch_size is not None and self.train_batch_size % 16:
            raise Gen2EmbedError(
                f"train_batch_size is {self.train_batch_size}; pass a multiple of 16, which clusters of k = 7 and 15 "
                "both divide"
            )

    def _check_places(self) -> None:
        if self.mini:
            given = [name for name in _DRAWN if getattr(self, name)]
            if given:
                raise Gen2EmbedError(f"{', '.join(given)} with --mini, which draws its own data; leave one of them out")
            return
        needed = ["data_dir", *(["plus_data_dir"] if self.table == "VI" else [])]
        needed += ["train_data_dir"] if self.table in TRAINED and self.models else []
        missing = [f"--{name}" for name in needed if not getattr(self, name)]
        if missing:
            raise Gen2EmbedError(
                f"table {self.table} needs {', '.join(missing)} (see docs/get_the_data.md); --mini runs it on small "
                "data that is drawn"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """The models of our rows; for V those that are trained."""
        if self.model_name or self.checkpoint:
            return self.model_name
        return ("gen2embed-mini",) if self.mini else ("gen2embed",)

    @property
    def modes(self) -> tuple[str, ...]:
        """The prompts of our rows, in the tables of `PROMPTS`."""
        return self.prompts or PROMPTS[self.table]

    @property
    def training(self) -> Training:
        """How models are trained: the paper's settings or those of `--mini`, with what the user changed."""
        base = MINI_TRAINING if self.mini else Training()
        names = {"train_batch_size": "batch_size"}
        given: dict[str, Any] = {
            names.get(field.name, field.name): value
            for field in fields(TrainingOptions)
            if not field.name.endswith("_dir") and (value := getattr(self, field.name)) is not None
        }
        if "num_epochs" in given:
            given["max_steps"] = None
        return Training(**{field.name: getattr(base, field.name) for field in fields(Training)} | given)
