"""Fine-tuning for Gen2Embed models: self-aware hard negative sampling (SaHa), its baselines, and the trainer.

``mine_clusters`` is Algorithm 1, and ``Clusters`` is what it returns. ``training_dataset`` turns data and sampling
files into a dataset and its ``DatasetClusters``. ``SahaBatchSampler`` makes batches of them. ``SahaLoss`` is the loss,
for ``SahaTrainer`` with ``SahaTrainingArguments`` or for sentence-transformers' own trainer; ``DistillationLoss`` and
``UnimeLoss`` are those of UniME's two stages. All names are imported on first use (PEP 562), so importing this package
does not load torch. This package imports ``gen2embed_mteb``, never the reverse.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches.dataset import DatasetClusters, OpenInputs, TrainingSet, training_dataset
    from .batches.sampler import SahaBatchSampler
    from .distillation.loss import DistillationLoss
    from .loss.saha_loss import SahaLoss
    from .loss.unime_loss import UnimeLoss
    from .recipe import SahaTrainingArguments
    from .saha.clusters import Clusters, mine_clusters
    from .trainer import SahaTrainer

__all__ = [
    "Clusters",
    "DatasetClusters",
    "DistillationLoss",
    "OpenInputs",
    "SahaBatchSampler",
    "SahaLoss",
    "SahaTrainer",
    "SahaTrainingArguments",
    "TrainingSet",
    "UnimeLoss",
    "mine_clusters",
    "training_dataset",
]

_LAZY = {
    "Clusters": ".saha.clusters",
    "DatasetClusters": ".batches.dataset",
    "DistillationLoss": ".distillation.loss",
    "OpenInputs": ".batches.dataset",
    "SahaBatchSampler": ".batches.sampler",
    "SahaLoss": ".loss.saha_loss",
    "SahaTrainer": ".trainer",
    "SahaTrainingArguments": ".recipe",
    "TrainingSet": ".batches.dataset",
    "UnimeLoss": ".loss.unime_loss",
    "mine_clusters": ".saha.clusters",
    "training_dataset": ".batches.dataset",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use and keep it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the lazy names too, so that completion offers them."""
    return sorted({*globals(), *__all__})
