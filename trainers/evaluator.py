"""Evaluates during training: MMEB's own score of the current model, as a sentence-transformers evaluator."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sentence_transformers.base.evaluation import BaseEvaluator

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.run_folder import WRITER
from gen2embed_mteb.mmeb.datasets import Benchmark
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.scoring import EvaluationResult, average
from gen2embed_mteb.storage.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


class MmebEvaluator(BaseEvaluator):
    """Measures Precision@1 on MMEB, MMEB-mini, or a part of either.

    Metrics are `overall` (the primary one), `ind`, `ood`, `meta_task_NAME` and `dataset_NAME`, in [0, 1]; a metric is
    left out if there is nothing to average. sentence-transformers puts `eval_NAME_` before them. With `widths` there
    are also `dim_D_overall`, `dim_D_ind`, … of the same vectors, cut to D dimensions. The reports of each run are
    written to `eval/NAME/step-N` in the training's output folder, and those of cut vectors to `step-N-dimD` beside it.
    Vectors are not kept, as the model has others after the next step: every evaluation encodes the whole benchmark
    again.

    Args:
        benchmark: MMEB, or another benchmark of its form.
        config: The settings; output folder, prompt and fingerprint are replaced by those of the run and its model.
        widths: To how many dimensions vectors are also cut; one that is the model's own adds nothing and is left out.
    """

    def __init__(self, benchmark: Benchmark, config: EvaluationConfig, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.name = benchmark.name
        self.primary_metric = f"{self.name}_overall"
        self._benchmark = benchmark
        self._config = config
        self._widths = tuple(widths)

    def __call__(
        self, model: Gen2Embed, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate the model.

        Args:
            model: The model, with its current weights.
            output_path: The folder for reports; None: no reports are kept.
            epoch: The epoch, for the model card.
            steps: The number of steps, for the model card and the folder's name.

        Returns:
            The metrics.

        Raises:
            DataError: A dataset or a column is missing, or a file is damaged.
        """
        with tempfile.TemporaryDirectory(prefix="gen2embed-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary if output_path is None else output_path)
            name = "last" if steps < 0 else f"step-{steps}"
            was_training = model.training
            model.eval()
            config = replace(
                self._config,
                prompt_mode=model.prompt_mode,
                fingerprint=fingerprint(model),
                overwrite=True,
            )
            narrower = [width for width in self._widths if width != model.get_embedding_dimension()]
            names: dict[int | None, str] = {None: name, **{width: f"{name}-dim{width}" for width in narrower}}
            figures: dict[str, float | None] = {}
            try:
                with OwnedFolder(folder / self.name / name, WRITER).scratch() as vectors:
                    # The encoder is made anew every time, as it caches states of the weights it was made with. This
                    # process does all of the encoding, as only the first process calls evaluators.
                    encoder = PrefixEncoder(model)
                    for width, place in names.items():
                        of_width = replace(config, output_dir=str(folder / self.name / place), truncate_dim=width)
                        result = evaluate(encoder, self._benchmark, of_width, Share(), vectors)
                        figures |= _figures(result, "" if width is None else f"dim_{width}_")
            finally:
                model.train(was_training)
        known = {name: figure for name, figure in figures.items() if figure is not None}
        metrics: dict[str, float] = self.prefix_name_to_metrics(known, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    @property
    def description(self) -> str:
        """The evaluator's name in the model card."""
        return f"{self._benchmark.title} Precision@1"


def _figures(result: EvaluationResult, prefix: str) -> dict[str, float | None]:
    """Return the averages, and in full width every dataset's figure, by name."""
    averages = average(result.scores)
    figures = {"overall": averages.overall, "ind": averages.ind, "ood": averages.ood}
    figures |= {f"meta_task_{name}": figure for name, figure in averages.meta_tasks.items()}
    if not prefix:
        figures |= {f"dataset_{score.dataset.name}": score.precision_at_1 for score in result.scores}
    return {prefix + name: figure for name, figure in figures.items()}
