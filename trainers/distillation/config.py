"""The flags of `gen2embed distill`; the libraries have the other training arguments.

Where UniME published a value (its Table 6), it is the default. What it left out follows E5-V, on which it builds, or
is argued for in `docs/guides/unime.md`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.config import FileOptions, ModelName, PromptOptions, ReadoutOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import option
from trainers.config import DTYPES
from trainers.distillation.loss import DIRECTIONS, TAU, Direction
from trainers.distillation.texts import TextConfig
from trainers.recipe import SahaTrainingArguments

EFFECTIVE_BATCH = 768
"""Rows per optimizer step, over all devices (UniME, Table 6)."""
PROMPT_MODE = "unime"


def batch_per_process() -> int:
    """Return the published number of rows per step, shared among the processes."""
    return max(EFFECTIVE_BATCH // Share.from_environment().world_size, 1)


@dataclass
class DistillArguments(SahaTrainingArguments):
    """The training arguments of sentence-transformers, with the defaults of stage 1."""

    num_train_epochs: float = option("passes over the texts", default=2.0, aliases=["num_epochs"])
    learning_rate: float = option("peak learning rate of AdamW", default=5e-4)
    per_device_train_batch_size: int = option(
        "rows (texts, or pairs of texts) per device and step; default: 768, shared among the processes",
        default_factory=batch_per_process,
        aliases=["batch_size"],
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TextConfig, ModelName, PromptOptions, ReadoutOptions, FileOptions):
    """Which model learns from which teacher, on which texts."""

    prompt_mode: str | None = option("strategy under which the texts are read", default=PROMPT_MODE)
    teacher: str = option("teacher: hub id, directory or short name of a SentenceTransformer", default="")
    teacher_vectors: str = option("file of the teacher's vectors, .npy or .parquet, in place of --teacher", default="")
    teacher_prompt: str = option("what --teacher reads before each text", default="")
    teacher_dir: str = option(
        "folder for the vectors of --teacher, which runs can share; default: OUTPUT_DIR-teacher", default=""
    )
    tau: float = option("temperature of both softmaxes", default=TAU)
    direction: Direction = option(
        "which divergence is minimized: KL(teacher || student), or KL(student || teacher) as UniME prints it",
        default="teacher-student",
        choices=DIRECTIONS,
    )
    diagonal: bool = option("whether the similarity of a text to itself belongs to its row", default=False)
    lora_rank: int = option("rank of the adapter", default=32, least=1)
    lora_alpha: int = option("its update is scaled by alpha / rank", default=16, least=1)
    lora_dropout: float = option("dropout on the adapter's input", default=0.05, least=0)
    lora_targets: tuple[str, ...] = option(
        "names of the layers it adapts; default: all linear layers of the language model", default=()
    )
    dora: bool = option("train magnitudes too (DoRA)", default=False)
    qlora: bool = option(
        "keep the frozen weights in four bits (nf4) while training; needs bitsandbytes; the adapter is merged into the "
        "plain weights",
        default=False,
    )
    sub_batch_size: int = option("rows in memory at a time", default=64, least=1)
    max_length: int = option("longest training input in tokens, prompt included", default=512, least=1)
    dtype: str = option(
        "type of the frozen weights while training; default: bfloat16 on a GPU with --bf16, else float32",
        default="",
        choices=DTYPES,
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        super().__post_init__()
        if bool(self.teacher) == bool(self.teacher_vectors):
            given = "both" if self.teacher else "neither"
            raise Gen2EmbedError(f"of teacher and teacher_vectors {given} is given; pass one of them")
        for name in ("teacher_prompt", "teacher_dir"):
            if getattr(self, name) and not self.teacher:
                raise Gen2EmbedError(f"{name} is given without teacher, whose vectors come from a file; leave it out")
        if not 0 < self.tau < float("inf"):
            raise Gen2EmbedError(f"tau is {self.tau}; pass a positive number, such as {TAU}")
        if self.lora_dropout >= 1:
            raise Gen2EmbedError(f"lora_dropout is {self.lora_dropout}; pass a share from 0 to below 1")
        if self.qlora and self.gguf_file:
            raise Gen2EmbedError("qlora and gguf_file cannot be combined: a GGUF file has its own few bits")

    def teacher_folder(self, output_dir: str | Path) -> Path:
        """Return the folder of the vectors of `teacher`."""
        output = Path(output_dir)
        return Path(self.teacher_dir).expanduser() if self.teacher_dir else output.with_name(f"{output.name}-teacher")
