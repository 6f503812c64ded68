"""`SahaTrainer`: sentence-transformers' trainer for `Gen2Embed` models and their adapters.

What it adds to the stock trainer:

1. Columns have roles: the first holds queries, which get the representation prompt, the others candidates.
2. Cells are opened when their batch is made (`collation.py`): images from paths, resized, rows padded on the right.
3. A checkpoint holds the adapter alone, and resuming sets it by key, every key checked: DoRA's magnitudes, which the
   stock trainer loses, continue to the bit.
4. What is saved at the end is the merged model in stock modules, with the adapter beside it in `adapter/`.

Losses, samplers, evaluators, callbacks and model cards are the stock ones, or of their kind.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from gen2embed_mteb.adapters import has_adapter, reload_adapter, save_adapter
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.image_source import ImageSource
from gen2embed_mteb.model import Gen2Embed
from gen2embed_mteb.prompts import HierarchicalPrompt, Role
from trainers.collation import CellReader
from trainers.loss import SahaLoss
from trainers.recipe import SahaTrainingArguments

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
_CARD_SECTION_BEFORE = "\n### Framework Versions"


def roles_of(
    columns: Sequence[str], prompt: HierarchicalPrompt, *, query_prompt_in_training: bool = True
) -> dict[str, Role]:
    """The role of every column, as sentence-transformers' `router_mapping` takes it.

    Args:
        columns: The columns in order; the first holds the queries.
        prompt: The prompt in use.
        query_prompt_in_training: False leaves the representation prompt off the queries, as the official code did.

    Raises:
        ValueError: Without the representation prompt a query would still not read as a candidate does, so there is no
            role that says it.
    """
    query: Role = "query"
    if not query_prompt_in_training:
        same = replace(prompt, query_text=prompt.document_text, query_image=prompt.document_image)
        if same.query_system != same.document_system or prompt.document_text or prompt.document_image:
            raise Gen2EmbedError(
                f"query_prompt_in_training=False with the prompt {prompt.name!r}: its queries differ from candidates "
                "in more than the representation prompt; use prompt_mode hierarchical, or leave the switch on"
            )
        query = "document"
    return {column: "document" if number else query for number, column in enumerate(columns)}


class SahaTrainer(SentenceTransformerTrainer):
    """Trains a `Gen2Embed` model; see the module's docstring for what differs from the stock trainer.

    Args:
        model: The model, with an adapter (`adapters.new_adapter`), or without one to train all of it.
        args: Training arguments; a `router_mapping` in them goes before the roles found here. Pass a
            `SahaBatchSampler` as their `batch_sampler`. None: the recipe's.
        train_dataset: Columns of cells as `collation.py` describes them; the first holds the queries.
        images: Opens images by path; None: as the model does, under its `image_root` if it has one.
        resize: A name of `images.RESIZE_POLICIES`.
        min_side: The least side of an image in pixels; see `images.ensure_min_side`.
        max_length: Longest training input in tokens, where the model allows as much; None: as long as it allows.
        query_prompt_in_training: False leaves the representation prompt off training queries.
        card_section: Markdown for the model card: where the data came from.
        kwargs: As for `SentenceTransformerTrainer`: `loss`, `evaluator`, `eval_dataset`, `callbacks`, …; the loss is
            `SahaLoss` unless there is one.

    Raises:
        ValueError: Names of columns collide, the resize policy is unknown, or a switch does not fit the prompt.
    """

    def __init__(
        self,
        model: Gen2Embed,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        images: ImageSource | None = None,
        resize: str = "square-448",
        min_side: int = 28,
        max_length: int | None = None,
        query_prompt_in_training: bool = True,
        card_section: str = "",
        **kwargs: Any,
    ) -> None:
        self._reader = CellReader(model, images, resize, min_side, max_length)
        self._card_section = card_section
        self._saves_checkpoint = False
        columns = _columns(train_dataset)
        _refuse_colliding(columns)
        args = copy.copy(args) if args is not None else SahaTrainingArguments(output_dir="tmp_trainer")
        args.router_mapping = args.router_mapping or roles_of(
            columns, model.prompt, query_prompt_in_training=query_prompt_in_training
        )
        # The stock trainer's examples show cells as they are stored, paths that mean nothing to a reader. It chooses
        # none, a thousand rows read for each, where there are some.
        model.model_card_data.widget = [{}]
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        model.model_card_data.widget = []
        self.add_callback(_EpochOfSampler(self))
        if isinstance(train_dataset, Dataset) and len(train_dataset):
            model.model_card_data.usage_examples = self._usage_examples(train_dataset)

    def get_data_collator(self, model: Gen2Embed, args: Any, processing_class: Any = None) -> Any:
        """The stock collator, which opens cells first."""
        collator = super().get_data_collator(model, args, processing_class)
        collator.preprocess_fn = self._reader
        return collator

    def get_default_loss(self, model: Gen2Embed) -> torch.nn.Module:
        """The recipe's loss, gathered across devices where there are several."""
        return SahaLoss(model, gather_across_devices=self.args.world_size > 1)

    def _usage_examples(self, dataset: Dataset, num_candidates: int = 3) -> list[Any]:
        """A query and the first distinct candidates, as a user passes them to the model."""
        query, candidate = dataset.column_names[:2]
        stored = [dataset[0][query]]
        for number in range(min(100, len(dataset))):
            cell = dataset[number][candidate]
            if cell not in stored[1:] and len(stored) <= num_candidates:
                stored.append(cell)
        contents = [self._reader.content(cell) for cell in stored]
        return [{"text": c.text, "image": c.images[0]} if c.images else c.text for c in contents]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the stock trainer; random numbers go on as if it had not been called, so that training does too."""
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the stock trainer; a checkpoint is an adapter, anything else the merged model.

        Where no process holds all weights (FSDP, ZeRO-3), the latter is the adapter too; `gen2embed export` merges it.
        """
        self._saves_checkpoint = _internal_call
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if has_adapter(model):
            inner = "0.model."
            state = {
                name.removeprefix(inner): value for name, value in (state_dict or {}).items() if name.startswith(inner)
            }
            whole = not self._saves_checkpoint and not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
            save_adapter(model[0].model, folder / ADAPTER_FOLDER if whole else folder, state or None)
            if not whole:
                return
        model.save_pretrained(str(folder))
        _add_to_card(folder / "README.md", self._card_section)

    def _load_from_checkpoint(self, checkpoint_path: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif has_adapter(self.model):
            reload_adapter(self.model[0].model, checkpoint_path)
        else:
            super()._load_from_checkpoint(checkpoint_path)


class _EpochOfSampler(TrainerCallback):
    """Tells the batch sampler the epoch.

    accelerate wraps it, twice where several processes resume within an epoch, and passes the epoch on one level only.
    """

    def __init__(self, trainer: SahaTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the epoch of the innermost sampler that knows epochs."""
        sampler = self._trainer.callback_handler.train_dataloader
        while (sampler := getattr(sampler, "batch_sampler", None)) is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))


def _columns(dataset: Any) -> list[str]:
    if dataset is None:
        return []
    names = next(iter(dataset.values())).column_names if isinstance(dataset, dict) else dataset.column_names
    return list(names)


def _refuse_colliding(columns: Sequence[str]) -> None:
    """sentence-transformers tells the features of columns apart by `COLUMN_` in front of their names."""
    for column in columns:
        for other in columns:
            if other.startswith(f"{column}_"):
                raise Gen2EmbedError(
                    f"columns {column!r} and {other!r} would be mixed up, as one begins with the other and '_'; "
                    "rename one (dataset.rename_column)"
                )


def _add_to_card(path: Path, section: str) -> None:
    """Puts a section before the versions, or at the end of a card without them."""
    if not section or not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    before, mark, after = card.partition(_CARD_SECTION_BEFORE)
    path.write_text(f"{before.rstrip()}\n\n{section.strip()}\n{mark}{after}", encoding="utf-8")
