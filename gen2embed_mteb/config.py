"""The settings that commands share: the model, how vectors are made, one evaluation run. See `flags` for how they work.

Settings of one command alone are beside it: `trainers.sampling.config`, `trainers.config`, `demo.config`. Those of
images are `images.resizing.ImageOptions`, the limits of rows `data_files.rows.RowLimits`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.distributed.options import EngineOptions
from gen2embed_mteb.embedder.calibration.fitting import SHRINKAGE, Means, check_settings
from gen2embed_mteb.embedder.prompts.strategies import TASK_STRATEGIES, strategy
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.embedder.reranking.config import RerankOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.names import DEFAULT, POOLINGS

ABLATION_PROMPTS = ("none", "system", "hierarchical")
ABLATION_READOUTS = ("last", "pre-mlp", "drop-1", "pre-mlp-raw")
LAYOUTS = ("native", "official", "raw")
OWN = "own"
"""The value of `calibration` that stands for a map fitted on the inputs of the evaluation itself."""
SCORINGS = ("cosine", "csls")
CSLS_NEIGHBORS = 10


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """Which model it is."""

    model_name: str = option("hub id, directory or short name", default=DEFAULT, aliases=["model_name_or_path"])


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompt of a model, and its revision."""

    prompt_mode: str | None = option("strategy (default: hierarchical, or an export's own)", default=None)
    revision: str | None = option("revision of the model on the hub", default=None)


@dataclass(frozen=True, kw_only=True)
class ReadoutOptions:
    """Which hidden state of a model becomes the embedding."""

    readout: str | None = option(
        "hidden state that becomes the embedding: last, pre-mlp, drop-1, drop-2, … (default: last, or an export's own)",
        default=None,
    )
    readout_norm: str | None = option(
        "whether the final norm is applied to it (default: true, or an export's own)",
        default=None,
        choices=("true", "false"),
    )

    @property
    def applies_norm(self) -> bool | None:
        """Whether the final norm is applied; `None` if it is not said."""
        return None if self.readout_norm is None else self.readout_norm == "true"


@dataclass(frozen=True, kw_only=True)
class ModelArgument:
    """Which model it is, as the first word behind the command."""

    model: str = option("base model, adapter or export: hub id, directory or short name", positional=True)


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Which file of a model's folder is loaded."""

    gguf_file: str | None = option("GGUF file of the model's folder, for a text-only model", default=None)


@dataclass(frozen=True, kw_only=True)
class InspectPromptOptions(PromptOptions, FileOptions, ModelArgument):
    """Of which model the prompt is shown, and which prompt."""

    dataset: str | None = option("dataset whose texts are shown, for freeret and lens (default: any)", default=None)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(PromptOptions, FileOptions):
    """What `doctor` checks: the installation, or a model on its weights."""

    model: str | None = option(
        "base model, adapter or export to check on its weights (default: check the installation)",
        default=None,
        positional=True,
    )
    adapter: str | None = option("LoRA or DoRA adapter: directory or hub id", default=None)
    device: str | None = option("cpu, cuda, cuda:1, …", default=None)

    def arguments(self) -> dict[str, Any]:
        """Return the options as `Gen2Embed` takes them; the model is loaded in float32."""
        names = ("prompt_mode", "revision", "gguf_file", "adapter", "device")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(PromptOptions, ReadoutOptions, FileOptions):
    """How a model is loaded, whichever it is."""

    adapter: str | None = option("LoRA or DoRA adapter: directory or hub id", default=None)
    max_length: int | None = option("longest input in tokens", default=None, least=1)
    num_crops: int | None = option(
        "most tiles of an image, for Phi-3.5-V (default: what the model's folder says, 4)", default=None, least=1
    )
    device: str | None = option("cpu, cuda, cuda:1, …", default=None)
    dtype: str | None = option("float32, bfloat16, float16, auto", default=None)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)

    def arguments(self) -> dict[str, Any]:
        """Return the options as `Gen2Embed` takes them."""
        return {
            "prompt_mode": self.prompt_mode,
            "readout": self.readout,
            "readout_norm": self.applies_norm,
            "adapter": self.adapter,
            "revision": self.revision,
            "gguf_file": self.gguf_file,
            "max_length": self.max_length,
            "device": self.device or _device_of_rank(),
            "model_kwargs": {"dtype": self.dtype} if self.dtype else None,
            "processor_kwargs": {"num_crops": self.num_crops} if self.num_crops else None,
        }


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadingOptions, ModelName):
    """Which model encodes, and how it is loaded."""

    layout: str = option("image layout in the prompt", default="native", choices=LAYOUTS)
    pooling: str = option(
        "last, the state at the last token; phrase, the mean over the phrase of --prompt_mode lens",
        default="last",
        choices=POOLINGS,
    )


def _device_of_rank() -> str | None:
    """Return the GPU of this process under torchrun; `None` leaves the choice to sentence-transformers."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return None
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(ImageOptions):
    """How the vectors of a run are made, whatever they are for."""

    batch_tokens: int | None = option(
        "tokens per call of the model, padding included (default: 1024 on a CPU, 8192 on a GPU)", default=None, least=1
    )
    batch_size: int = option("inputs per call of the model, at most", default=512, least=1)
    num_workers: int | None = option(
        "processes that open images and prepare inputs; 0: threads of this process (default: some on a GPU, where the "
        "images are many)",
        default=None,
        least=0,
    )
    max_error_rate: float = option("share of rejected rows above which the run counts as failed", default=0.001)
    overwrite: bool = option(
        "replace what was made with another model, prompt or setting; without it a run goes on where one stopped",
        default=False,
        opposite="resume",
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        check_options(self)
        if not 0 <= self.max_error_rate <= 1:
            raise Gen2EmbedError(f"max_error_rate is {self.max_error_rate}; pass a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a calibration is fitted."""

    shrinkage: float = option("how little the directions are evened out, up to 1", default=SHRINKAGE)
    means: Means = option("one mean for both sides, or one for each", default="shared", choices=get_args(Means))


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(FitOptions):
    """How vectors are compared. They are stored before that, so that none of these options encodes anything again."""

    calibration: str = option(
        "folder of a calibrated model, whose calibration is applied; or own: fitted on the evaluation's own inputs, "
        "without labels (transductive)",
        default="",
    )
    scoring: str = option(
        "score of a candidate; csls subtracts its mean cosine with the nearest queries (transductive)",
        default="cosine",
        choices=SCORINGS,
    )
    csls_neighbors: int = option("nearest queries that csls averages over", default=CSLS_NEIGHBORS, least=1)
    truncate_dim: int | None = option(
        "compare the first N dimensions alone, brought to length 1 again; a calibration comes before, csls after "
        "(default: all)",
        default=None,
        least=1,
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, or it would have no effect.
        """
        check_options(self)
        check_settings(self.shrinkage, self.means)
        if self.calibration != OWN and (self.shrinkage, self.means) != (SHRINKAGE, "shared"):
            raise Gen2EmbedError(
                f"shrinkage is {self.shrinkage} and means is {self.means!r}, but nothing is fitted; they belong to "
                "--calibration own (a calibrated folder has its own)"
            )
        if self.scoring != "csls" and self.csls_neighbors != CSLS_NEIGHBORS:
            raise Gen2EmbedError(f"csls_neighbors is {self.csls_neighbors}, but scoring is not csls; pass both")

    @property
    def comparison(self) -> str:
        """A name of these options for folders and titles; empty for the plain cosine."""
        parts = []
        if self.calibration:
            parts.append(OWN if self.calibration == OWN else f"calibrated-{Path(self.calibration).resolve().name}")
            parts += [f"a{self.shrinkage:g}"] if self.shrinkage != SHRINKAGE else []
            parts += [self.means] if self.means != "shared" else []
        parts += [] if self.truncate_dim is None else [f"dim{self.truncate_dim}"]
        if self.scoring != "cosine":
            parts.append(self.scoring + (f"{self.csls_neighbors}" if self.csls_neighbors != CSLS_NEIGHBORS else ""))
        return "-".join(parts)

    @property
    def is_plain(self) -> bool:
        """Whether vectors are compared by their cosine without a calibration, in whichever width."""
        return not self.calibration and self.scoring == "cosine"

    @property
    def transductive(self) -> bool:
        """Whether inputs of the evaluation itself are used beside the one that is scored."""
        return self.calibration == OWN or self.scoring == "csls"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(
    ComparisonOptions, RerankOptions, EncodingConfig, EngineOptions, RowLimits, LinkOption, RemoteOption
):
    """The settings of one evaluation run."""

    data_dir: str = option(
        "folder or hub id of the benchmark's tables; the -mini ones draw their own", needs="a folder"
    )
    output_dir: str = option(
        "default: results/<benchmark>/<model>/<prompt_mode>, with readout, calibration, truncation, scoring and "
        "reranking in its name",
        needs="a folder",
    )
    embedding_dir: str = option(
        "folder for vectors, which runs of one model can share (default: embeddings, in the output folder of the run "
        "without calibration, truncation, scoring and reranking)",
        default="",
    )
    image_dir: str = option("folder or .zip archive of the images; default: beside the tables", default="")
    plain_captions: bool = option(
        "SugarCrepe: captions without the paper's prefix, as UniME compares them; its groups are then shown",
        default=False,
    )
    split: str = option("split to evaluate", default="test", flag="eval_split")
    subsets: tuple[str, ...] = option("datasets to run (default: all)", default=())
    meta_tasks: tuple[str, ...] = option(
        "Classification, VQA, Retrieval, Grounding (default: all)", default=(), flag="meta_task"
    )
    limit: int | None = option("rows per dataset, from the first (default: all)", default=None, least=1)
    model_name: str = option("the model, for the reports", default="", flag=None)
    revision: str = option("its revision, for the reports", default="", flag=None)
    prompt_mode: str = option("the prompt strategy, for the reports", default="hierarchical", flag=None)
    readout: str = option("the readout's name, for the reports", default="last", flag=None)
    backbone: str = option("the model's backbone, for the reports (default: the model)", default="", flag=None)
    calibrated_on: int = option(
        "how many inputs the model itself was calibrated on, for the reports", default=0, least=0, flag=None
    )
    calibration_data: str = option("what these inputs were, for the reports", default="", flag=None)
    fingerprint: str = option(
        "digest of weights and prompts; embeddings are reused only where it is equal", default="", flag=None
    )
    leaderboard: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "metadata of the V2 leaderboard file, beyond the model's name", "flag": None},
    )

    def __post_init__(self) -> None:
        """Check every value, so that a run does not fail hours later.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        EncodingConfig.__post_init__(self)
        ComparisonOptions.__post_init__(self)
        self.check_remote()
        self.check_rerank()
        self.check_engine()
        if self.rerank is not None and self.engine == "ray":
            raise Gen2EmbedError(
                "reranking is shared by torchrun, not by Ray; evaluate with --engine ray first, then with --rerank and "
                "--engine local, which finds the vectors in the same --embedding_dir"
            )
        if not self.fingerprint:
            # Without it the vectors of one model could be taken for those of another.
            raise Gen2EmbedError("fingerprint is empty; pass a digest of the model's weights and prompts")

    @property
    def vectors_folder(self) -> Path:
        """The folder of the vectors."""
        return Path(self.embedding_dir) if self.embedding_dir else Path(self.output_dir) / "embeddings"


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """Whether `evaluate` tables every prompt, readout and calibration instead of one run, and which."""

    ablation: bool = option(
        "table every prompt x readout x calibration x scoring of a model, each input encoded once per text around it; "
        "the vectors of all r readouts are kept: r x d float32 numbers per input, on disk, and in memory for one "
        "dataset at a time",
        default=False,
    )
    ablation_prompts: tuple[str, ...] = option("prompts that --ablation tables", default=ABLATION_PROMPTS)
    ablation_readouts: tuple[str, ...] = option(
        "readouts that --ablation tables; -raw leaves the final norm out; those that the model cannot give are left "
        "out, and named",
        default=ABLATION_READOUTS,
    )
    ablation_data: str = option(
        "training pairs, as calibrate --data takes them, on whose inputs --ablation fits a calibration for every "
        "prompt and readout (default: no such rows)",
        default="",
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: One of the others is given without `ablation`, a name is unknown, or one is given twice.
        """
        check_options(self)
        given = [
            name
            for name, default in (
                ("ablation_prompts", ABLATION_PROMPTS),
                ("ablation_readouts", ABLATION_READOUTS),
                ("ablation_data", ""),
            )
            if getattr(self, name) != default
        ]
        if given and not self.ablation:
            raise Gen2EmbedError(f"{', '.join(given)} without ablation would have no effect; pass --ablation, too")
        prompts = [strategy(name).name for name in self.ablation_prompts]
        if per_dataset := [name for name in prompts if name in TASK_STRATEGIES]:
            raise Gen2EmbedError(
                f"ablation_prompts has {', '.join(per_dataset)}, whose texts differ by dataset; evaluate it by itself, "
                "with --prompt_mode"
            )
        for name, found in (("prompts", prompts), ("readouts", [one.name for one in self.readouts])):
            if not found or len(set(found)) < len(found):
                raise Gen2EmbedError(f"ablation_{name} is {', '.join(found) or 'empty'}; name each once")

    @property
    def readouts(self) -> tuple[Readout, ...]:
        """The readouts.

        Raises:
            Gen2EmbedError: A name is unknown.
        """
        return tuple(Readout.named(name) for name in self.ablation_readouts)
