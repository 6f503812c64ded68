"""`SahaTrainer`: sentence-transformers' trainer for `Gen2Embed` models and their adapters.

What it adds to the stock trainer:

1. Columns have roles: the first column holds queries, which get the representation prompt; the others hold candidates.
2. Cells are opened when their batch is made (`collation.py`): images are read and resized, rows padded on the right.
3. A checkpoint holds only the adapter. Resuming loads it by key and checks every key, so that DoRA's magnitudes, which
   the stock trainer loses, continue bit for bit. A checkpoint is there as a whole or not at all (`checkpoints.py`), and
   it holds the figures (`figures.py`), so that a resumed run ends in the same files as one that was never interrupted.
4. At the end, the merged model is saved in stock modules, with the adapter beside it in `adapter/`. It is written into
   a temporary folder first; nothing in the output folder that is not ours is replaced.

Losses, samplers, evaluators, callbacks and model cards are the stock ones, or work in the same way.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerControl
from transformers.trainer_utils import TrainOutput

from gen2embed_mteb.embedder.chat_formats.probing import takes_images
from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import has_adapter, reload_adapter, save_adapter
from gen2embed_mteb.errors import Gen2EmbedError, full_disk_as_os_error
from gen2embed_mteb.images.resizing import MIN_SIDE, ImageOptions
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage.atomic import new_token, temporary_of
from gen2embed_mteb.storage.new_folder import new_folder
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.batches.collation import CellReader
from trainers.batches.columns import columns_of, refuse_colliding, roles_of, with_missing_texts
from trainers.batches.image_rows import check_minibatches
from trainers.batches.sampler import EpochOfSampler
from trainers.loss.saha_loss import SahaLoss, reads_facts
from trainers.output.card import add_to_card
from trainers.output.checkpoints import WRITER, delete_oldest, make_room, newest_whole, place_of, require_whole
from trainers.output.figures import FIGURES_FILE, TIMING_FILE, Figures, Timing, without_times
from trainers.output.folder import RUN_FILE
from trainers.recipe import SahaTrainingArguments, refusing_flags

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"
KEPT_FILES = {RUN_FILE, TIMING_FILE}
"""Files of the output folder that are not part of a model."""


class SahaTrainer(SentenceTransformerTrainer):
    """Trains a `Gen2Embed` model; see the module's docstring for what differs from the stock trainer.

    Args:
        model: The model, with an adapter (`adapters.new_adapter`), or without one to train all weights.
        args: Training arguments; if they have a `router_mapping`, it is used instead of the roles found here. Pass a
            `SahaBatchSampler` as their `batch_sampler`. None: the recipe's arguments.
        train_dataset: Columns of cells as `collation.py` describes them; the first holds the queries.
        images: Opens images by path; None: the model opens them, under its `image_root` if it has one.
        resize: A name of `resizing.RESIZE_POLICIES`.
        min_side: The least side of an image in pixels; see `resizing.ensure_min_side`.
        exif_orientation: Whether images are turned as their EXIF data says.
        max_length: The longest training input in tokens, where the model allows as much; None: the model's own limit.
        query_prompt_in_training: False leaves the representation prompt off training queries.
        card_section: A section in Markdown for the model card that says where the data came from.
        kwargs: As for `SentenceTransformerTrainer`: `loss`, `evaluator`, `eval_dataset`, `callbacks`, …; the default
            loss is `SahaLoss`.

    Raises:
        ValueError: Names of columns collide, the resize policy is unknown, a switch does not fit the prompt, or the
            model averages a phrase (`pooling="phrase"`).
    """

    control: TrainerControl

    def __init__(
        self,
        model: Gen2Embed,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        *,
        images: ImageSource | None = None,
        resize: str = "square-448",
        min_side: int = MIN_SIDE,
        exif_orientation: bool = False,
        max_length: int | None = None,
        query_prompt_in_training: bool = True,
        card_section: str = "",
        **kwargs: Any,
    ) -> None:
        if model.pooling == "phrase":
            raise Gen2EmbedError(
                "pooling='phrase' cannot be trained: what is trained is saved, and no stock module can express it; "
                "load the model without it"
            )
        reason = model.inexpressible
        if reason and not has_adapter(model[0].model):
            raise Gen2EmbedError(
                f"{reason} cannot be saved, so that only an adapter can be trained: gen2embed train adds one, as does "
                "model_folder.adapters.new_adapter"
            )
        train_dataset = with_missing_texts(train_dataset)
        self._reader = CellReader(
            model,
            images,
            ImageOptions(resize=resize, min_side=min_side, exif_orientation=exif_orientation),
            max_length,
        )
        self.card_section = card_section
        self._saves_checkpoint = False
        columns = columns_of(train_dataset)
        refuse_colliding(columns)
        args = copy.copy(args) if args is not None else SahaTrainingArguments(output_dir="tmp_trainer")
        args.router_mapping = args.router_mapping or roles_of(
            columns, model.prompt, query_prompt_in_training=query_prompt_in_training
        )
        # The stock trainer's examples show cells as they are stored, with paths that tell a reader nothing, and it
        # reads a thousand rows to choose each. It chooses none if the card has examples already.
        model.model_card_data.widget = [{}]
        if args.push_to_hub:
            raise Gen2EmbedError(
                "push_to_hub is True; leave it out, and upload the finished folder: hf upload REPO DIR"
            )
        # The stock trainer deletes every folder called checkpoint-N; `checkpoints.delete_oldest` deletes only ours.
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        model.model_card_data.widget = []
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        self._reader.states_facts = all(reads_facts(loss) for loss in losses)
        zero3 = is_deepspeed_zero3_enabled()  # no process holds all weights
        if family_of(model[0].config.model_type).is_generic and takes_images(model.processor) and not zero3:
            check_minibatches(model, self._reader)
        self.add_callback(EpochOfSampler(self))
        self._figures = Figures(self)
        self.add_callback(self._figures)
        self._timing = Timing(args.output_dir)
        if isinstance(train_dataset, Dataset) and len(train_dataset):
            model.model_card_data.usage_examples = self._usage_examples(train_dataset)

    def get_data_collator(self, model: Gen2Embed, args: Any, processing_class: Any = None) -> Any:
        """Return the stock collator, with our reader that opens the cells."""
        collator = super().get_data_collator(model, args, processing_class)
        collator.preprocess_fn = self._reader
        return collator

    def get_default_loss(self, model: Gen2Embed) -> torch.nn.Module:
        """Return the recipe's loss, which gathers negatives across devices if there are several."""
        return SahaLoss(model, gather_across_devices=self.args.world_size > 1)

    def _usage_examples(self, dataset: Dataset, num_candidates: int = 3) -> list[Any]:
        """Return a query and the first distinct candidates, as a user passes them to the model."""
        query, candidate = dataset.column_names[:2]
        stored = [dataset[0][query]]
        for number in range(min(100, len(dataset))):
            cell = dataset[number][candidate]
            if cell not in stored[1:] and len(stored) <= num_candidates:
                stored.append(cell)
        contents = [self._reader.content(cell) for cell in stored]
        return [{"text": c.text, "image": c.images[0]} if c.images else c.text for c in contents]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as the stock trainer does, and leave the random state as it was, so that training is not changed."""
        cuda = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=cuda):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the stock trainer does, but do no further step if the run has done all its steps.

        Args:
            resume_from_checkpoint: A checkpoint; True: the newest whole one of the output folder.
            args: As in the stock trainer.
            kwargs: As in the stock trainer.

        Raises:
            Gen2EmbedError: The checkpoint is damaged, or was not written by this trainer; or it has no optimizer state
                (`save_only_model`), so that training cannot go on bit for bit.
        """
        checkpoint, step = self._checkpoint(resume_from_checkpoint), 0
        if checkpoint is not None:
            if not (checkpoint / FIGURES_FILE).is_file():
                raise Gen2EmbedError(f"{checkpoint} was saved with save_only_model: its run cannot go on")
            step = int(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())["global_step"])
        self._figures.checkpoint = checkpoint
        self._timing.begin(step)
        eval_on_start = self.args.eval_on_start
        try:
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start

    def _checkpoint(self, wanted: str | bool | None) -> Path | None:
        """Return the checkpoint to go on at, after a check that it is whole; None to begin anew."""
        if not wanted:
            return None
        if wanted is not True:
            require_whole(wanted)
            return Path(wanted)
        newest = newest_whole(self.args.output_dir)
        if newest is None:
            raise Gen2EmbedError(f"{self.args.output_dir} holds no whole checkpoint; leave resume_from_checkpoint out")
        return newest

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the stock trainer does, but keep no times in the history; the mean loss is that of the whole run."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)
        entry = self.state.log_history[-1]
        self.state.log_history[-1] = without_times(entry)
        self._timing.note(
            self.state.global_step, {name: entry[name] for name in entry if name not in without_times(entry)}
        )

    def _validate_args(self, *args: Any, **kwargs: Any) -> None:
        with refusing_flags():
            super()._validate_args(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Do what the stock trainer does, and report flags that do not go together in one line."""
        with refusing_flags():
            super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create what the stock trainer does, and report flags that do not go together in one line."""
        with refusing_flags():
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Create what the stock trainer does, and report flags that do not go together in one line."""
        with refusing_flags():
            return super().create_scheduler(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        begin = super()._init_training_state(*args, **kwargs)
        # The best checkpoint is looked for beside the others, since the folder may have been moved.
        if self._figures.checkpoint is not None and (step := self.state.best_global_step):
            best = place_of(self._figures.checkpoint.parent, step)
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return begin

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._catch_up(kwargs["model"], kwargs["trial"], kwargs["ignore_keys_for_eval"], kwargs["start_time"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # the stock loop does one step before it checks
            return
        super()._run_epoch(*args, **kwargs)

    def _catch_up(self, model: Any, trial: Any, ignore_keys_for_eval: Any, start_time: float) -> None:
        """Do the work at the end of an epoch, if the checkpoint was saved at its last step, before that work."""
        if not self._figures.epoch_end_is_due:
            return
        self._figures.epoch_end_is_due = False
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
        figures = self._figures
        self._maybe_log_save_evaluate(
            self._tr_loss,
            figures.grad_norm,
            model,
            trial,
            self.state.epoch,
            ignore_keys_for_eval,
            start_time,
            learning_rate=figures.learning_rate,
        )

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        self._figures.grad_norm = grad_norm.item() if isinstance(grad_norm, torch.Tensor) else grad_norm
        self._figures.learning_rate = kwargs["learning_rate"]
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        self._catch_up(self.model_wrapped, trial, None, start_time)
        outcome = super()._finalize_training(trial, num_train_samples, start_time)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            delete_oldest(self._get_output_dir(trial), self._save_total_limit, [best] if best else [])
            self._timing.write(self.state.global_step)
        return TrainOutput(outcome.global_step, outcome.metrics["train_loss"], outcome.metrics)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the stock trainer does, but so that the checkpoint appears as a whole, with a ledger of its files."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        output_dir = self._get_output_dir(trial=trial)
        target = place_of(output_dir, self.state.global_step)
        if self.state.best_global_step:
            best = place_of(output_dir, self.state.best_global_step)
            if best == target or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        with full_disk_as_os_error(output_dir), self._new_checkpoint(target) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                self._figures.write(folder)
            if self.args.should_save:
                self._note_callbacks()
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        if self.args.should_save:
            best_so_far = self.state.best_model_checkpoint
            delete_oldest(output_dir, self._save_total_limit, [best_so_far] if best_so_far else [])
            self._timing.write(self.state.global_step)

    @contextlib.contextmanager
    def _new_checkpoint(self, target: Path) -> Iterator[Path]:
        """Yield a checkpoint's temporary folder, the same in all processes; rename it when all have written to it."""
        token = [new_token()]
        if self.args.world_size > 1:
            broadcast_object_list(token)
        folder = temporary_of(target, token[0])
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()
            folder.mkdir(parents=True, exist_ok=True)  # it is missing only on another host with its own disk
            yield folder
            self.accelerator.wait_for_everyone()
        else:
            make_room(target)
            with new_folder(target, WRITER, token[0]):
                self.accelerator.wait_for_everyone()
                yield folder
                self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _note_callbacks(self) -> None:
        """Put the state of every callback that has one into the trainer's state, as the stock trainer does."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state

    def _load_best_model(self) -> None:
        """Load the best checkpoint, or raise an error if it is damaged; the stock trainer would keep the last model."""
        best = self.state.best_model_checkpoint
        require_whole(best)
        self.model.model_card_data.set_best_model_step(self.state.best_global_step)
        self._load_from_checkpoint(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter alone for a checkpoint, and the merged model otherwise.

        If no process holds all weights (FSDP, ZeRO-3), it always saves the adapter; `gen2embed export` merges it. So it
        does for a model that stock modules cannot express, such as Phi-3.5-V; its adapter is loaded on the base model.

        Raises:
            ForeignFileError: It would replace a file that this trainer did not write, or that was changed since.
            OSError: The disk is full; what was there before is unchanged.
        """
        self._saves_checkpoint = _internal_call
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = OwnedFolder(output_dir or self.args.output_dir, WRITER)
        with contextlib.ExitStack() as stack:
            scratch = folder.path
            if self.args.should_save:
                stack.enter_context(full_disk_as_os_error(folder.path))
                scratch = stack.enter_context(folder.scratch())
            super().save_model(str(scratch), _internal_call)
            if self.args.should_save:
                before = set(folder.known()) - KEPT_FILES
                for name in sorted(before - set(folder.adopt(scratch))):
                    if folder.owns(name):  # a file of an earlier model in this folder
                        folder.remove(name)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return  # the stock trainer lets every process write the same files
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if has_adapter(model):
            inner = "0.model."
            state = {
                name.removeprefix(inner): value for name, value in (state_dict or {}).items() if name.startswith(inner)
            }
            shared = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            whole = not self._saves_checkpoint and not shared and not model.inexpressible
            save_adapter(model[0].model, folder / ADAPTER_FOLDER if whole else folder, state or None)
            if not whole:
                return
        model.save_pretrained(str(folder))
        add_to_card(folder / "README.md", self.card_section)

    def _load_from_checkpoint(self, checkpoint_path: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            Trainer._load_from_checkpoint(self, checkpoint_path, model)
        elif has_adapter(self.model):
            reload_adapter(self.model[0].model, checkpoint_path)
        else:
            super()._load_from_checkpoint(checkpoint_path)
