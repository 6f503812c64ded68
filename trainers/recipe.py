"""The training recipe (paper, Sec. IV-A and Table VII; the adapter's details from the official code) as defaults.

`SahaTrainingArguments` has all training arguments of sentence-transformers; where the recipe names a value, it is the
default. `Recipe` has the settings that are not among them: the adapter, the loss, and how inputs are presented.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers.utils import is_liger_kernel_available

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.flags import check_number, check_options, option
from gen2embed_mteb.images.resizing import RESIZE_POLICIES, ImageOptions
from trainers.loss.matryoshka import check_widths
from trainers.loss.unime_loss import VARIANTS

EFFECTIVE_BATCH = {"saha": 2048, "in-batch": 1024}
"""Pairs per optimizer step, over all devices (Table VII): 256 clusters of k = 7, or 128 of k = 15; 1,024 plain pairs.

Plain hard negatives use the value of `in-batch`: Table VII compares them with it."""


OFFICIAL = "official"
"""The value of `lora_targets` that stands for `OFFICIAL_TARGETS`."""

OFFICIAL_TARGETS = (
    *("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    *("k_proj", "q_proj", "out_proj", "v_proj"),
)
"""What the official code adapts, in every model that has layers of these names."""

LOSSES = ("saha", "in-batch", "unime")
"""What `--loss` can name."""


def bf16_supported() -> bool:
    """Say whether a GPU computes in bfloat16; CPUs can do it too, but most of them more slowly than in float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def recipe_batch(method: str, cluster_size: int) -> int:
    """Return the recipe's number of pairs per process and step, a multiple of the cluster's size.

    Args:
        method: One of `records.METHODS`.
        cluster_size: The number of pairs per cluster.
    """
    effective = EFFECTIVE_BATCH["saha" if method == "saha" else "in-batch"]
    share = effective // Share.from_environment().world_size
    return max(share // cluster_size, 1) * cluster_size


@contextlib.contextmanager
def refusing_flags(*more: type[Exception]) -> Iterator[None]:
    """Report a library's error about training arguments in one line, as a mistake of the user.

    Use it only around the call that reads the arguments. Such errors are flags that do not go together, or that need
    another package.

    Args:
        more: Further exceptions to report, beside `ValueError`, `ImportError`, `TypeError` and `KeyError`.

    Raises:
        Gen2EmbedError: The library raised one of them; the message is the library's own.
    """
    kinds: tuple[type[Exception], ...] = (ValueError, ImportError, TypeError, KeyError, *more)
    try:
        yield
    except Gen2EmbedError:
        raise
    except kinds as error:
        raise Gen2EmbedError(f"these training arguments cannot be used: {one_line(error)}") from error


_LEAST = {
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "per_device_train_batch_size": 1,
    "seed": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
}
_FINITE = (*_LEAST, "num_train_epochs", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")


@dataclass
class SahaTrainingArguments(SentenceTransformerTrainingArguments):
    """The training arguments of sentence-transformers, with the recipe's defaults."""

    num_train_epochs: float = option("passes over the clusters", default=1.5, aliases=["num_epochs"])
    learning_rate: float = option("peak learning rate of AdamW", default=5e-5)
    warmup_steps: float = option("optimizer steps of linear warm-up; below 1, the share of all steps", default=100)
    per_device_train_batch_size: int = option(
        "pairs per device and step; default: the recipe's, shared among the processes",
        default_factory=lambda: recipe_batch("saha", 8),
        aliases=["batch_size"],
    )
    bf16: bool = option("compute in bfloat16; default: where a GPU supports it", default_factory=bf16_supported)
    logging_steps: float = option("optimizer steps between two logs", default=10)
    save_steps: float = option("optimizer steps between two checkpoints", default=200)

    def __post_init__(self) -> None:
        """Check every value; without an accelerator, turn pinned memory off, as `use_cpu` does."""
        for name in _FINITE:
            check_number(name, getattr(self, name), _LEAST.get(name))
        if self.neftune_noise_alpha is not None:
            raise Gen2EmbedError("neftune_noise_alpha is not supported: its noise would be added to image tokens too")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise Gen2EmbedError("use_liger_kernel is True, but not installed: pip install liger-kernel")
        super().__post_init__()
        if self.fsdp and self.world_size == 1:
            raise Gen2EmbedError("fsdp shares a model among processes, and this is one; start it with torchrun")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False


@dataclass(frozen=True, kw_only=True)
class Recipe(ImageOptions):
    """The settings of the adapter, of the loss and of how inputs are presented."""

    lora_rank: int = option("rank of the adapter", default=8, least=1)
    lora_alpha: int = option("its update is scaled by alpha / rank", default=64, least=1)
    lora_dropout: float = option("dropout on the adapter's input", default=0.1)
    lora_targets: list[str] = option(
        f"names of the layers it adapts; {OFFICIAL}: those of the official code, which for Phi-3.5-V are also in the "
        "vision tower (default: the family's own, of the language model alone)",
        default_factory=list,
    )
    dora: bool = option("train magnitudes too (DoRA)", default=True)
    loss: str = option(
        "saha, all other pairs of the batch are negatives; in-batch, the same, but nothing is masked; unime, the k "
        "hardest of the batch without false negatives",
        default="saha",
        choices=LOSSES,
    )
    beta: float | None = option(
        "with --loss unime: a candidate that is more similar than the positive by more than this is dropped "
        "(default: 0.1)",
        default=None,
    )
    unime_variant: str | None = option(
        "with --loss unime: what is done where fewer than k are left, repeat them (paper) or, as the official code, "
        "fill up with what was dropped (default: paper)",
        default=None,
        choices=VARIANTS,
    )
    matryoshka_dims: list[int] = option(
        "numbers of dimensions, the largest first, at each of which the loss is computed on cut vectors, such as 1536 "
        "768 256 64 (default: all dimensions alone)",
        default_factory=list,
    )
    matryoshka_weights: list[float] = option(
        "the weight of each of them in the sum (default: 1 for each)", default_factory=list
    )
    temperature: float = option("temperature of the loss", default=0.02)
    sub_batch_size: int = option("pairs in memory at a time (16 for 2B, 4 for 7B)", default=16, least=1)
    mask_equal_positives: bool = option(
        "no positive counts as a negative of an equal one, with --loss saha and unime", default=True
    )
    resize: str = option(
        "how images are resized before the processor", default="square-448", choices=tuple(RESIZE_POLICIES)
    )
    query_prompt_in_training: bool = option(
        "representation prompt on training queries; the official code forgot it", default=True
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        check_options(self)
        if not 0 <= self.lora_dropout < 1:
            raise Gen2EmbedError(f"lora_dropout is {self.lora_dropout}; pass a share from 0 to below 1")
        if not 0 < self.temperature < math.inf:
            raise Gen2EmbedError(f"temperature is {self.temperature}; pass a positive number, such as 0.02")
        check_widths(self.matryoshka_dims, self.matryoshka_weights)
        for name in ("beta", "unime_variant"):
            value = getattr(self, name)
            if value is not None and self.loss != "unime":
                raise Gen2EmbedError(f"{name} is {value}, but loss is {self.loss}; pass --loss unime, or leave it out")
