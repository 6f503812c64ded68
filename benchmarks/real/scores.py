"""Precision@1 under calibrations that are fitted on other tasks' inputs, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.embedder.calibration.fitting import Means, Moments, Spectrum
from gen2embed_mteb.names import Side
from real.tasks import Half, Task

SIDES: tuple[Side, Side] = ("query", "document")
Hits = npt.NDArray[np.bool_]
Encode = Callable[[Task, Side], npt.NDArray[np.float32]]
_RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """A calibration.

    Attributes:
        name: Its name in the tables.
        shrinkage: That of the map; `None`: no map.
        means: One mean, or one per side.
        own: Whether the map is fitted on the task's own inputs, which is transductive.
        neighbors: That of CSLS, which is transductive, too; 0: the cosine.
        among: Only tasks whose names begin so are fitted on.
        width: How many dimensions are kept; 0: all.
        by_variance: Whether those of the largest variance among the inputs that the map was fitted on are kept, in
            place of the model's first ones.
    """

    name: str
    shrinkage: float | None = None
    means: Means = "shared"
    own: bool = False
    neighbors: int = 0
    among: str = ""
    width: int = 0
    by_variance: bool = False

    @property
    def is_transductive(self) -> bool:
        """Whether the task's own unlabelled inputs are used."""
        return self.own or self.neighbors > 0


class Scorer:
    """The scores of one strategy and readout.

    Args:
        tasks: All tasks.
        encode: Returns (n, d) unit rows of the n texts of a task on a side.
    """

    def __init__(self, tasks: Sequence[Task], encode: Encode) -> None:
        """Look up the vectors."""
        self._tasks = {task.name: task for task in tasks}
        self._vectors = {(task.name, side): encode(task, side) for task in tasks for side in SIDES}
        self._moments: dict[tuple[str, Side], Moments] = {}
        self._fitted: dict[tuple[tuple[str, ...], Means], Spectrum] = {}

    def hits(self, task: Task, setting: Setting) -> Hits:
        """Return for each query whether the right candidate scores higher than every other: (q,) bool."""
        scores = self.cosines(task, setting)
        return np.asarray(scores[:, 0] > scores[:, 1:].max(axis=1))

    def cosines(self, task: Task, setting: Setting) -> npt.NDArray[np.float64]:
        """Return the score of each query's candidates, (q, k) float64; column 0 is the right one's."""
        queries, documents = (self._mapped(task, side, setting) for side in SIDES)
        scores = queries @ documents.T
        if setting.neighbors:
            best = np.partition(scores, -setting.neighbors, axis=0)[-setting.neighbors :]
            scores = 2 * scores - best.mean(axis=0)
        return np.asarray(np.take_along_axis(scores, task.candidates, axis=1))

    def num_inputs(self, task: Task, setting: Setting) -> int:
        """Return how many unlabelled inputs a setting uses for a task."""
        if setting.shrinkage is None:
            return sum(self._sums(task.name, side).count for side in SIDES) if setting.neighbors else 0
        return sum(self._sums(name, side).count for name in self._sources(task, setting) for side in SIDES)

    def _sources(self, task: Task, setting: Setting) -> tuple[str, ...]:
        """Return the tasks whose inputs a map may see: never those of the reported half, but for `own`."""
        if setting.own:
            return (task.name,)
        others = (other for other in self._tasks.values() if other.half == "choice" and other is not task)
        return tuple(other.name for other in others if other.name.startswith(setting.among))

    def _mapped(self, task: Task, side: Side, setting: Setting) -> npt.NDArray[np.float64]:
        vectors = self._vectors[task.name, side].astype(np.float64)
        if setting.shrinkage is None or not self._sources(task, setting):
            return _cut(vectors, setting.width)
        fitted = self._spectrum(self._sources(task, setting), setting.means)
        # In the eigenvectors' basis, which changes no cosine: W without its last factor.
        mapped = (vectors - fitted.means[side]) @ fitted.directions / np.sqrt(fitted.shrunk(setting.shrinkage))
        if setting.by_variance:
            mapped = mapped[:, ::-1]  # the variances ascend
        elif setting.width:
            mapped = mapped @ fitted.directions.T
        return _cut(mapped, setting.width)

    def _sums(self, name: str, side: Side) -> Moments:
        if (name, side) not in self._moments:
            self._moments[name, side] = _moments(self._vectors[name, side])
        return self._moments[name, side]

    def _spectrum(self, sources: tuple[str, ...], means: Means) -> Spectrum:
        if (sources, means) in self._fitted:
            return self._fitted[sources, means]
        width = next(iter(self._vectors.values())).shape[1]
        both = []
        for side in SIDES:
            moments = Moments(width)
            for name in sources:
                moments.merge(self._sums(name, side))
            both.append(moments)
        return self._fitted.setdefault((sources, means), Spectrum.of(*both, means))


def _cut(vectors: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the first dimensions of vectors, or all, at length 1."""
    kept = vectors[:, : width or None]
    return np.asarray(kept / np.linalg.norm(kept, axis=1, keepdims=True))


def _moments(vectors: npt.NDArray[np.float32]) -> Moments:
    moments = Moments(vectors.shape[1])
    moments.add(np.unique(vectors, axis=0))
    return moments


@dataclass(frozen=True)
class Interval:
    """A figure with a bootstrap interval of 95 %, all in [-1, 1]."""

    figure: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return the three figures, rounded."""
        return [round(value, 4) for value in (self.figure, self.low, self.high)]


def mean_of(hits: Mapping[str, Hits], names: Sequence[str], base: Mapping[str, Hits] | None = None) -> Interval:
    """Return the mean over tasks of precision@1, or of its difference to another run on the same queries.

    Args:
        hits: The hits by task.
        names: The tasks.
        base: The other run.

    Returns:
        The mean; its interval comes from drawing the queries of each task with replacement.
    """
    chance = np.random.default_rng(0)
    gains = [hits[name].astype(float) - (base[name] if base is not None else 0.0) for name in names]
    figures = np.zeros(_RESAMPLES)
    for gain in gains:
        figures += gain[chance.integers(0, len(gain), (_RESAMPLES, len(gain)))].mean(axis=1) / len(gains)
    low, high = np.quantile(figures, [0.025, 0.975])
    return Interval(float(np.mean([gain.mean() for gain in gains])), float(low), float(high))


def names_of(tasks: Sequence[Task], half: Half) -> list[str]:
    """Return the names of the tasks of a half."""
    return [task.name for task in tasks if task.half == half]
