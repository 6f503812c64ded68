"""Keeps the figures of a run in its checkpoints, so that a resumed run reports what an uninterrupted one does.

If a run is stopped and resumed, transformers' trainer loses the losses since the last log, their sum over the run
(which it divides by the steps of the last process alone), and the model card's table. Our checkpoints hold them in
`figures.json`. Times differ from run to run: they are left out of the trainer's state, of `train.json` and of the model
card, and are written to `timing.json`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import SequentialEvaluator
from transformers import Trainer, TrainerCallback

from gen2embed_mteb.storage.atomic import write_in_scratch
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.output.checkpoints import WRITER

FIGURES_FILE, TIMING_FILE = "figures.json", "timing.json"
_OF_TIME = re.compile(r"_(runtime|(samples|steps|tokens)_per_second|mem_(cpu|gpu)_\w+|jit_compilation_time)$")


def without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without those that differ from run to run: times, speeds and memory.

    Args:
        metrics: As the trainer logs them.
    """
    return {name: value for name, value in metrics.items() if not _OF_TIME.search(name)}


class Timing:
    """Writes `timing.json`: how long each start of a run took, and each evaluation.

    Args:
        output_dir: The folder of the run; what its `timing.json` already says is kept.
    """

    def __init__(self, output_dir: str | Path) -> None:
        """Read what earlier processes noted."""
        self._folder = OwnedFolder(output_dir, WRITER)
        self._earlier = self._read()
        self._evaluations: list[dict[str, Any]] = []
        self._from_step, self._start = 0, time.monotonic()

    def _read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"runs": [], "evaluations": []}
        if not self._folder.owns(TIMING_FILE):
            return empty
        return empty | dict(json.loads((self._folder.path / TIMING_FILE).read_bytes()))

    def begin(self, step: int) -> None:
        """Start to measure time.

        Args:
            step: The steps done by earlier processes; 0 forgets what they noted.
        """
        self._from_step, self._start = step, time.monotonic()
        if not step:
            self._earlier = {"runs": [], "evaluations": []}

    def note(self, step: int, times: Mapping[str, Any]) -> None:
        """Note the times of an evaluation.

        Args:
            step: The number of steps done.
            times: Metrics of time by name; if none is of an evaluation, nothing is noted.
        """
        if any(name.startswith("eval_") for name in times):
            self._evaluations.append({"step": step, **times})

    def write(self, step: int) -> None:
        """Write the file.

        Args:
            step: The number of steps done.
        """
        seconds = round(time.monotonic() - self._start, 3)
        runs = [*self._earlier["runs"], {"from_step": self._from_step, "to_step": step, "seconds": seconds}]
        value = {
            "train_runtime": round(sum(run["seconds"] for run in runs), 3),
            "runs": runs,
            "evaluations": [*self._earlier["evaluations"], *self._evaluations],
        }
        self._folder.write_json(TIMING_FILE, value)


class Figures(TrainerCallback):
    """Keeps a trainer's figures in its checkpoints, and gives them back to a trainer that resumes.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Store the trainer; nothing is read before training begins."""
        self._trainer = trainer
        self._at_epoch_end = False
        self.checkpoint: Path | None = None
        self.epoch_end_is_due = False
        self.grad_norm: float | None = None
        self.learning_rate: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the trainer is within an epoch."""
        self._at_epoch_end = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that what follows belongs to the end of an epoch."""
        self._at_epoch_end = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the figures of the checkpoint, after the stock callbacks have reset theirs."""
        card = self._trainer.model.model_card_data
        card._training_start_time = None  # leaves "Training Time" out of the card
        self.epoch_end_is_due = False
        if self.checkpoint is None:
            return
        figures = json.loads((self.checkpoint / FIGURES_FILE).read_bytes())
        trainer = self._trainer
        rank = args.process_index if len(figures["loss_sums"]) == args.world_size else 0
        trainer._tr_loss = torch.tensor(figures["loss_sums"][rank], device=args.device)
        trainer._total_loss_scalar = figures["loss_total"]
        trainer._globalstep_last_logged = figures["last_logged_step"]
        trainer.accum_loss_components["train"] = {
            name: torch.tensor(values[rank], device=args.device) for name, values in figures["loss_parts"].items()
        }
        self.grad_norm, self.learning_rate = figures["grad_norm"], figures["learning_rate"]
        card.training_logs = list(figures["card"]["training_logs"])
        for evaluator, metrics in zip(self._evaluators(), figures["card"]["evaluations"], strict=False):
            if metrics is not None:
                card.eval_results_dict[evaluator] = metrics
        # The run may have been killed after the last step of an epoch, before the work at the epoch's end was done.
        ended = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        self.epoch_end_is_due = ended and not figures["at_epoch_end"]
        args.eval_on_start = False  # the run was evaluated when it started

    def write(self, folder: Path) -> None:
        """Write the figures into a checkpoint that is being made; every process must call this.

        Args:
            folder: The checkpoint, under its temporary name.
        """
        trainer = self._trainer
        card = trainer.model.model_card_data
        parts = trainer.accum_loss_components["train"]
        figures = {
            "at_epoch_end": self._at_epoch_end,
            "loss_sums": self._gathered(trainer._tr_loss),
            "loss_total": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "loss_parts": {name: self._gathered(parts[name]) for name in sorted(parts)},
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "card": {
                "training_logs": card.training_logs,
                "evaluations": [card.eval_results_dict.get(evaluator) for evaluator in self._evaluators()],
            },
        }
        if trainer.args.should_save:
            # JSON with NaN where a loss was NaN, as in the trainer's own state.
            text = json.dumps(figures, indent=2, default=float) + "\n"
            write_in_scratch(folder / FIGURES_FILE, text.encode())

    def _gathered(self, value: torch.Tensor) -> list[float]:
        """Return the value of each process."""
        found = self._trainer.accelerator.gather(value.detach().reshape(1))
        return [float(one) if found.is_floating_point() else int(one) for one in found.tolist()]

    def _evaluators(self) -> list[Any]:
        """Return the evaluators whose figures the card shows."""
        evaluator = self._trainer.evaluator
        if evaluator is None:
            return []
        return [evaluator, *(evaluator.evaluators if isinstance(evaluator, SequentialEvaluator) else [])]
