"""The vectors of one dataset as they are compared: calibrated, cut and with CSLS's correction, as far as asked for.

Calibration and CSLS may use inputs of the dataset itself, without labels; then each distinct input counts once, however
many rows have it. Two inputs with the same text and images are the same, whatever the names of the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import OWN, EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
from gen2embed_mteb.embedder.calibration.fitting import LEAST_INPUTS, Moments, check_number_of_inputs
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.csls import hubness
from gen2embed_mteb.evaluation.truncation import cut
from gen2embed_mteb.mmeb.datasets import DatasetInfo
from gen2embed_mteb.mmeb.readers import EvalRow, read_eval_rows
from gen2embed_mteb.mmeb.tables import SubsetTable
from gen2embed_mteb.names import Side

Vectors = npt.NDArray[np.float32]
_CHUNK = 4096


@dataclass(frozen=True)
class Comparison:
    """What the rows of a dataset are scored with.

    Attributes:
        vectors: (n, d) float32 per side, unit rows.
        hubs: What `csls.hubness` returned for the candidates, (m,) float64; `None` where the cosine is the score.
        num_unlabelled: How many of the dataset's own inputs were used beside the one that is scored.
    """

    vectors: Mapping[Side, Vectors]
    hubs: npt.NDArray[np.float64] | None = None
    num_unlabelled: int = 0

    def cut(self, width: int | None) -> Comparison:
        """Return the comparison by the first dimensions alone, before CSLS is added; see `truncation.cut`."""
        return replace(self, vectors={side: cut(rows, width) for side, rows in self.vectors.items()})


def calibrated(
    name: str,
    vectors: Mapping[Side, Vectors],
    *,
    distinct: Mapping[Side, npt.NDArray[np.int64]],
    config: EvaluationConfig,
    stored: AffineMap | None,
) -> Comparison:
    """Apply a calibration to the vectors of a dataset: the stored map, or one that is fitted on them.

    Args:
        name: The dataset's name, for messages.
        vectors: (n, d) float32 per side, as the model made them.
        distinct: Row numbers per side, one for each distinct input.
        config: The run's settings.
        stored: The map of the calibrated folder, if the settings name one.

    Raises:
        Gen2EmbedError: A map is to be fitted and there are too few inputs, or the stored map is of another width.
    """
    used, chosen = 0, stored
    if config.calibration == OWN:
        sums = {side: _moments(vectors[side], rows) for side, rows in distinct.items()}
        used = sum(part.count for part in sums.values())
        chosen = _fitted(name, sums, config)
    if chosen is None:
        return Comparison(vectors)
    return Comparison({side: chosen.apply(side, rows) for side, rows in vectors.items()}, None, used)


def with_csls(
    comparison: Comparison, queries: npt.NDArray[np.int64], candidate_side: Side, neighbors: int
) -> Comparison:
    """Return a comparison by CSLS instead of the cosine.

    Args:
        comparison: The vectors.
        queries: Row numbers of the side `query`, one for each distinct query of the dataset; candidates may be on that
            side, too.
        candidate_side: The side of the candidates.
        neighbors: K.
    """
    if not len(queries):
        return comparison
    bank = comparison.vectors["query"][queries]
    hubs = hubness(comparison.vectors[candidate_side], bank, neighbors)
    return Comparison(comparison.vectors, hubs, comparison.num_unlabelled or len(bank))


def first_of_each(contents: Sequence[object]) -> npt.NDArray[np.int64]:
    """Return the number of the first of each distinct content, ascending."""
    first: dict[object, int] = {}
    for number, content in enumerate(contents):
        first.setdefault(content, number)
    return np.array(list(first.values()), dtype=np.int64)


def require_own_inputs(dataset: DatasetInfo, table: SubsetTable, config: EvaluationConfig) -> None:
    """Refuse a dataset with too few inputs to fit a map on; call it before anything is encoded.

    Cost: rows are read until there are enough inputs, which the first rows of a dataset of MMEB have.

    Args:
        dataset: The dataset.
        table: Its table.
        config: The run's settings.

    Raises:
        Gen2EmbedError: There are too few; the message names their number.
    """
    seen: set[tuple[Side, Item]] = set()
    side: Side = "query" if dataset.candidates_as_queries else "document"
    for row in read_eval_rows(table, dataset, config.limit, config):
        if isinstance(row, EvalRow):
            seen.add(("query", row.query))
            seen.update((side, item) for item in row.candidates)
        if len(seen) >= LEAST_INPUTS:
            return
    refuse_too_few(dataset.name, len(seen))


def refuse_too_few(name: str, number: int) -> None:
    """Refuse a number of inputs that is too small to fit a map on.

    Args:
        name: The dataset's name, for the message.
        number: How many distinct inputs it has, queries and candidates together.

    Raises:
        Gen2EmbedError: It is too small; the message names it.
    """
    with _named(name):
        check_number_of_inputs(number)


def _moments(vectors: Vectors, rows: npt.NDArray[np.int64]) -> Moments:
    sums = Moments(vectors.shape[1])
    for start in range(0, len(rows), _CHUNK):
        sums.add(vectors[rows[start : start + _CHUNK]])
    return sums


def _fitted(name: str, sums: Mapping[Side, Moments], config: EvaluationConfig) -> AffineMap:
    width = max(len(part.total) for part in sums.values())
    queries, documents = (part if part.count else Moments(width) for part in (sums["query"], sums["document"]))
    with _named(name):
        return AffineMap.fitted(queries, documents, shrinkage=config.shrinkage, means=config.means)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the dataset, and what to do about it, in an error about its inputs."""
    try:
        yield
    except Gen2EmbedError as error:
        raise Gen2EmbedError(
            f"{name}: --calibration {OWN}: {error}. Without --limit there are more inputs; --subsets leaves a dataset "
            "out; a calibrated folder needs none"
        ) from error
