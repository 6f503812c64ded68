"""Evaluation during training: MMEB's own score of the model as it is now, as a sentence-transformers evaluator."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sentence_transformers.base.evaluation import BaseEvaluator

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.run_folder import WRITER
from gen2embed_mteb.mmeb.datasets import Benchmark
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.scoring import average
from gen2embed_mteb.storage.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


class MmebEvaluator(BaseEvaluator):
    """Precision@1 on MMEB, MMEB-mini, or a part of either.

    Metrics are `overall` (the primary one), `ind`, `ood`, `meta_task_NAME` and `dataset_NAME`, in [0, 1], as far as
    there is something to average; sentence-transformers puts `eval_NAME_` before them. The reports of each run go to
    `eval/NAME/step-N` of the training's output folder; vectors are not kept, as the next step's model has others.

    Args:
        benchmark: MMEB, or another of its form.
        config: The settings; folder, model and fingerprint are those of the run and the model at hand.
    """

    def __init__(self, benchmark: Benchmark, config: EvaluationConfig) -> None:
        super().__init__()
        self.name = benchmark.name
        self.primary_metric = f"{self.name}_overall"
        self._benchmark = benchmark
        self._config = config

    def __call__(
        self, model: Gen2Embed, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate the model.

        Args:
            model: The model, with whatever weights it has now.
            output_path: Where reports go; None: nowhere.
            epoch: For the model card.
            steps: For the model card, and the folder's name.

        Returns:
            The metrics.

        Raises:
            DataError: A dataset or a column is missing, or a file is damaged.
        """
        with tempfile.TemporaryDirectory(prefix="gen2embed-") as temporary:
            folder = Path(temporary if output_path is None else output_path)
            folder = folder / self.name / ("last" if steps < 0 else f"step-{steps}")
            was_training = model.training
            model.eval()
            config = replace(
                self._config,
                output_dir=str(folder),
                prompt_mode=model.prompt_mode,
                fingerprint=fingerprint(model),
                overwrite=True,
            )
            try:
                with OwnedFolder(folder, WRITER).scratch() as vectors:
                    # A new encoder every time: it keeps states of the weights it was made with. All of the encoding
                    # is this process's, as sentence-transformers calls evaluators in the first process only.
                    result = evaluate(PrefixEncoder(model), self._benchmark, config, Share(), vectors)
            finally:
                model.train(was_training)
        averages = average(result.scores)
        figures = {"overall": averages.overall, "ind": averages.ind, "ood": averages.ood}
        figures |= {f"meta_task_{name}": figure for name, figure in averages.meta_tasks.items()}
        figures |= {f"dataset_{score.dataset.name}": score.precision_at_1 for score in result.scores}
        known = {name: figure for name, figure in figures.items() if figure is not None}
        metrics: dict[str, float] = self.prefix_name_to_metrics(known, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    @property
    def description(self) -> str:
        """How the model card calls it."""
        return f"{self._benchmark.title} Precision@1"
