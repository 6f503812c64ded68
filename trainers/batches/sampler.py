"""`SahaBatchSampler`: batches of whole clusters, all of one size, for sentence-transformers' trainers.

    SentenceTransformerTrainingArguments(
        ..., per_device_train_batch_size=256 * 8, batch_sampler=partial(SahaBatchSampler, sampling=sampling)
    )

An epoch is planned in steps; a step is one batch for each process, since negatives are gathered across processes:

1. The clusters are shuffled, all together or each subset on its own, and cut into steps. The last step is filled with
   clusters from the front of the same shuffle: no cluster is lost, no batch is short, and no cluster is twice in a
   step. (Unequal batches, or a number of batches that the processes cannot share evenly, would be dropped under data
   parallelism, or would leave processes waiting for each other.)
2. The steps are shuffled.
3. Within a batch, clusters of one subset are put side by side, so that the rows of a sub-batch are of similar length.
4. Clusters that sampling left short are filled up with further pairs of their subset ("fillers"), preferably with pairs
   that share neither row nor positive with the step.

5. Of a query with several positives, one pair is taken (`DatasetClusters.of_epoch`), in each epoch the next.

Everything follows from the seed and the epoch, in every process alike.

Cost: the sampler reads no data, only indices. An epoch's plan takes memory for one number per cluster. Every missing
row of a short cluster is compared with at most `LOOK_AHEAD` rows; for this, a few numbers per row are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.util import get_world_size
from transformers import Trainer, TrainerCallback

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.batches.dataset import DatasetClusters
from trainers.sampling.files import Sampling

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

LOOK_AHEAD = 4096
"""The number of rows among which a filler is chosen: the first of those that conflict least."""


class SahaBatchSampler(DefaultBatchSampler):
    """Makes batches of whole clusters.

    Pass it as `batch_sampler=functools.partial(SahaBatchSampler, sampling=…)`; the trainer passes the arguments before
    `sampling`. A lambda works as well, but cannot be saved with the training arguments.

    Args:
        dataset: The training data; its rows are those that `sampling` names.
        batch_size: The rows per batch on one process, a multiple of the cluster's k + 1.
        drop_last: Has no effect: every batch is full.
        valid_label_columns: Has no effect: clusters need no labels.
        generator: Has no effect: batches follow from seed and epoch.
        seed: The seed of the shuffles.
        sampling: What `read_sampling` returned, once or several times, for a dataset of exactly the rows that were
            sampled, subset after subset; or clusters in rows of the dataset (`training_dataset`).
        mix_subsets: Whether a batch mixes clusters of several subsets.
        num_processes: The number of processes that take batches in turn; None: as torch.distributed says.

    Attributes:
        epoch: The epoch, set by the trainer.

    Raises:
        SamplingError: The files do not give clusters of pairs; see `DatasetClusters.of`.
        ValueError: The dataset is not the one that was sampled, `batch_size` is no multiple of k + 1, or a subset is
            smaller than a cluster or, where it must fill a step on its own, smaller than a step.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        drop_last: bool = False,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        sampling: DatasetClusters | Sampling | Sequence[Sampling],
        mix_subsets: bool = True,
        num_processes: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        clusters = sampling if isinstance(sampling, DatasetClusters) else DatasetClusters.of(sampling)
        self.clusters, self.mix_subsets = clusters, mix_subsets
        self.num_processes = get_world_size() if num_processes is None else num_processes
        if len(dataset) != clusters.num_rows:
            raise Gen2EmbedError(
                f"the dataset has {len(dataset)} rows, the sampling files are of {clusters.num_rows}; pass the dataset "
                "that was sampled. Evaluation data needs a batch sampler of its own"
            )
        if batch_size % clusters.width:
            above = clusters.width * (batch_size // clusters.width + 1)
            raise Gen2EmbedError(
                f"batch_size is {batch_size}, but a cluster has {clusters.width} rows (k + 1); pass a multiple of it, "
                f"such as {above}"
            )
        self._per_step = self.num_processes * batch_size // clusters.width
        subsets = range(len(clusters.names))
        self._groups = [np.flatnonzero(clusters.subsets == subset) for subset in subsets]
        if mix_subsets:
            self._groups = [np.arange(len(clusters))]
        self._usable = [np.unique(clusters.rows[clusters.subsets == subset]) for subset in subsets]
        self._usable = [rows[rows >= 0] for rows in self._usable]
        self._check_sizes()

    def _check_sizes(self) -> None:
        names, width = self.clusters.names, self.clusters.width
        for name, rows in zip(names, self._usable, strict=True):
            if len(rows) < width:
                raise Gen2EmbedError(f"subset {name} has {len(rows)} rows, a cluster takes {width}; leave it out")
        for name, group in zip(("all together",) if self.mix_subsets else names, self._groups, strict=True):
            if len(group) < self._per_step:
                raise Gen2EmbedError(
                    f"{name}: {len(group)} clusters, but a step takes {self._per_step} ({self.num_processes} x "
                    f"{self.batch_size} rows, {width} a cluster); lower the batch size"
                    + ("" if self.mix_subsets else ", mix subsets, or leave this one out")
                )

    @property
    def num_fillers(self) -> int:
        """The number of rows of this epoch that fill up short clusters."""
        return int((self.clusters.rows[self._plan(self._rng())] < 0).sum())

    @property
    def num_repeated(self) -> int:
        """The number of clusters that come a second time in an epoch, so that the last steps are full."""
        return len(self) * self.batch_size // self.clusters.width - len(self.clusters)

    def __len__(self) -> int:
        """Return the number of batches per epoch, of all processes together; it is the same in every epoch."""
        return self.num_processes * sum(-(-len(group) // self._per_step) for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        rng = self._rng()
        plan = self._plan(rng)
        fillers = _Fillers(self.clusters, [rng.permutation(rows) for rows in self._usable])
        taken = self.clusters.of_epoch(self.seed, self.epoch)
        for step in map(self._neighbourly, plan):
            rows = self.clusters.rows[step]
            fillers.fill(rows, self.clusters.subsets[step])
            rows = rows if taken is None else rows + taken[rows]
            for batch in rows.reshape(self.num_processes, self.batch_size):
                yield batch.tolist()

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch))

    def _plan(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return the epoch's clusters, (steps, clusters per step)."""
        # `resize` begins again at the front; a step is no longer than the group, so no cluster is in a step twice.
        steps = [
            np.resize(rng.permutation(group), (-(-len(group) // self._per_step), self._per_step))
            for group in self._groups
        ]
        return rng.permutation(np.concatenate(steps))

    def _neighbourly(self, step: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return a step in which the clusters of one subset are side by side in each batch.

        The loss does not depend on the order, but a sub-batch is as wide as its longest row, so long rows (images)
        should not be with short ones (labels).
        """
        batches = step.reshape(self.num_processes, -1)
        order = np.argsort(self.clusters.subsets[batches], axis=1, kind="stable")
        return np.take_along_axis(batches, order, axis=1).ravel()


class _Fillers:
    """Chooses rows for short clusters, from one shuffled list of rows per subset."""

    def __init__(self, clusters: DatasetClusters, decks: list[npt.NDArray[np.int64]]) -> None:
        self._decks, self._next = decks, [0] * len(decks)
        rows = np.arange(clusters.num_rows)
        # If positives are not known, they are assumed to differ.
        self._positives = rows if clusters.positives is None else clusters.positives
        self._row_taken = np.zeros(clusters.num_rows, dtype=bool)
        self._positive_taken = np.zeros(int(self._positives.max(initial=-1)) + 1, dtype=bool)

    def fill(self, rows: npt.NDArray[np.int64], subsets: npt.NDArray[np.int64]) -> None:
        """Fill up the clusters of one step, in place.

        Args:
            rows: (clusters per step, k + 1) The rows, -1 where one is missing.
            subsets: (clusters per step,) The subset of each cluster.
        """
        short = np.flatnonzero((rows < 0).any(axis=1))
        if not len(short):
            return
        present = rows[rows >= 0]
        self._mark(present, True)
        for cluster in short:
            for place in np.flatnonzero(rows[cluster] < 0):
                own = rows[cluster][rows[cluster] >= 0]
                rows[cluster, place] = self._deal(int(subsets[cluster]), own)
                self._mark(rows[cluster, [place]], True)
        self._mark(rows.ravel(), False)

    def _mark(self, rows: npt.NDArray[np.int64], taken: bool) -> None:
        self._row_taken[rows] = taken
        self._positive_taken[self._positives[rows]] = taken

    def _deal(self, subset: int, own: npt.NDArray[np.int64]) -> int:
        deck = self._decks[subset]
        places = (self._next[subset] + np.arange(min(len(deck), LOOK_AHEAD))) % len(deck)
        cards = deck[places]
        positives = self._positives[cards]
        # The worst conflict first: the row is already in the cluster (never the result, as a subset has at least as
        # many rows as a cluster); it is already in the step; its positive is in the cluster; its positive is in the
        # step.
        conflicts = 8 * np.isin(cards, own) + 4 * self._row_taken[cards]
        conflicts = conflicts + 2 * np.isin(positives, self._positives[own]) + self._positive_taken[positives]
        chosen = int(conflicts.argmin())
        self._next[subset] = int(places[chosen]) + 1
        return int(cards[chosen])


class EpochOfSampler(TrainerCallback):
    """A callback that tells the batch sampler the epoch.

    accelerate wraps it, twice where several processes resume within an epoch, and passes the epoch on one level only.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Keep the trainer; nothing is read before training begins."""
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch of the innermost sampler that knows epochs."""
        sampler = self._trainer.callback_handler.train_dataloader
        while (sampler := getattr(sampler, "batch_sampler", None)) is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(int(state.epoch or 0))
