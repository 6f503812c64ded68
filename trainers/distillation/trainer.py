"""`DistillTrainer`: trains an adapter on texts, and merges it into the model as it was before training.

What is written at the end is not the model that was trained, whose weights may be in four bits or in another type, but
the base model, loaded again in its own type, with the adapter merged into it. Then the written folder is loaded as any
program would load it: every tensor that has no adapter must be there, equal to the last bit. So the vision tower, the
projector, and the language model's embeddings and norms are what they were.

Cost: memory for two copies of the model on the CPU while it is written, as for `gen2embed export` with an adapter, and
one pass over its bytes.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import load_adapter, save_adapter
from gen2embed_mteb.errors import Gen2EmbedError
from trainers.trainer import SahaTrainer


class DistillTrainer(SahaTrainer):
    """Trains the adapter of a model on texts with a label; see the module's docstring for what it writes.

    Args:
        model: The model, with an adapter.
        args: As for `SahaTrainer`.
        train_dataset: One or more columns of texts, and a column `label`.
        base: Loads the base model of the adapter, as `AutoModel` has it, in the type of its files.
        kwargs: As for `SahaTrainer`.
    """

    def __init__(self, model: Gen2Embed, *args: Any, base: Callable[[], torch.nn.Module], **kwargs: Any) -> None:
        self._base = base
        super().__init__(model, *args, **kwargs)

    def _usage_examples(self, dataset: Dataset, num_candidates: int = 3) -> list[Any]:
        """Return the first distinct texts."""
        column = dataset.column_names[0]
        return list(dict.fromkeys(dataset[:100][column]))[: num_candidates + 1]

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        apart = self._saves_checkpoint or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        if apart or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        model = self.accelerator.unwrap_model(self.model)
        trained = model[0].model
        adapted = [name for name, module in trained.named_modules() if isinstance(module, BaseTunerLayer)]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as adapter:
            save_adapter(trained, Path(adapter))
            base = self._base()
            before = digests(base.state_dict(), adapted)
            load_adapter(base, adapter)
        model[0].model = base
        try:
            super()._save(output_dir)
        finally:
            model[0].model = trained
        del base  # there is room for the written one
        folder = str(output_dir or self.args.output_dir)
        written = Gen2Embed(folder, device="cpu", model_kwargs={"dtype": "auto"})
        check_unchanged(written[0].model.state_dict(), before)


def digests(state: Mapping[str, torch.Tensor], adapted: Collection[str]) -> dict[str, str]:
    """Return a digest of every tensor that no adapter changes, by its name.

    Args:
        state: The tensors of the base model.
        adapted: The names of the layers that have an adapter.
    """
    changed = set(adapted)
    return {name: _digest(tensor) for name, tensor in state.items() if name.rpartition(".")[0] not in changed}


def check_unchanged(written: Mapping[str, torch.Tensor], before: Mapping[str, str]) -> None:
    """Compare the tensors of the written model with those of the base model, but for those that an adapter changed.

    Args:
        written: The tensors of the written model.
        before: What `digests` returned.

    Raises:
        Gen2EmbedError: One is missing or differs.
    """
    wrong = sorted(name for name in before if name not in written or _digest(written[name]) != before[name])
    if wrong:
        raise Gen2EmbedError(
            f"{len(wrong)} tensors that have no adapter were not written as they were, the first {wrong[0]}. Nothing "
            "was kept; the adapter is in the last checkpoint: merge it with gen2embed export"
        )


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=32)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
