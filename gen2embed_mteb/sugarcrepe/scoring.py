"""The sets of SugarCrepe and SugarCrepe++, and the scoring of a record, a set and a run.

SugarCrepe has a caption and a hard negative per image; a record is right if sim(image, caption) > sim(image, negative).
SugarCrepe++ has two captions and a negative. Image-to-text (ITT): both captions must be more similar to the image than
the negative. Text only (TOT): sim(caption, caption2) must exceed sim(caption, negative) and sim(caption2, negative).

Unlike MMEB's, the official rule is strict: a tie counts as wrong. Ties are also reported, since many of them show that
all vectors of a model are nearly the same. Averages give each set the same weight. Source: paper, Section IV-A and
Table VI.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.evaluation.run import RunSummary


@dataclass(frozen=True)
class CaptionBenchmark:
    """A compositionality benchmark.

    Attributes:
        name: The name on the command line and in `results.json`.
        title: The name in tables.
        sets: Its sets by the paper's names, each with the name of its file (without `.json`).
        captions: The caption fields of a record, the positives first, the negative last.
    """

    name: str
    title: str
    sets: dict[str, str]
    captions: tuple[str, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The figures reported for a set: `itt`, and also `tot` if there are two positives."""
        return ("itt", "tot") if len(self.captions) > len(("caption", "negative_caption")) else ("itt",)


SUGARCREPE_BENCHMARK = CaptionBenchmark(
    "sugarcrepe",
    "SugarCrepe",
    {
        name: name
        for name in ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")
    },
    ("caption", "negative_caption"),
)

SUGARCREPE_PLUS_BENCHMARK = CaptionBenchmark(
    "sugarcrepe++",
    "SugarCrepe++",
    {
        "swap_object": "swap_obj",
        "swap_attribute": "swap_att",
        "replace_object": "replace_obj",
        "replace_attribute": "replace_att",
        "replace_relation": "replace_rel",
    },
    ("caption", "caption2", "negative_caption"),
)


@dataclass(frozen=True)
class SetScore:
    """The outcome of one set.

    Attributes:
        name: The set.
        hits: By task, one outcome per scored record.
        ties: By task, one flag per scored record: whether a positive and the negative are equally similar.
        num_errors: The number of records that were set aside.
    """

    name: str
    hits: dict[str, list[bool]]
    ties: dict[str, list[bool]]
    num_errors: int

    @property
    def num_scored(self) -> int:
        """The number of scored records."""
        return len(self.hits["itt"])

    def accuracy(self, task: str, *, ties_count: bool = False) -> float | None:
        """Return the share of right records in [0, 1]; None if none was scored.

        Args:
            task: `itt` or `tot`.
            ties_count: Whether a tie counts as right, to show how much ties change the figure.
        """
        pairs = list(zip(self.hits[task], self.ties[task], strict=True))
        return sum(hit or (ties_count and tie) for hit, tie in pairs) / len(pairs) if pairs else None


@dataclass(frozen=True, kw_only=True)
class CompositionalityResult(RunSummary):
    """The outcome of a run.

    Attributes:
        benchmark: The benchmark that was run.
        scores: One score per set, in order.
    """

    benchmark: CaptionBenchmark
    scores: tuple[SetScore, ...]

    def overall(self, task: str) -> float | None:
        """Return the mean accuracy over the sets, in [0, 1]; None if none was scored.

        Args:
            task: `itt` or `tot`.
        """
        figures = [figure for score in self.scores if (figure := score.accuracy(task)) is not None]
        return sum(figures) / len(figures) if figures else None


def score_record(image: npt.NDArray[np.float32], captions: npt.NDArray[np.float32]) -> list[tuple[bool, bool]]:
    """Score one record.

    Args:
        image: (d,) float32, unit length.
        captions: (2, d) float32 unit rows, caption and negative; or (3, d), two captions and the negative.

    Returns:
        (right, tied) for ITT, and for TOT if there are two captions. Tied means: not right, but the negative is not
        more similar than any caption either.
    """
    negative = captions[-1]
    # Sums of products, not a matrix product: equal vectors must give equal similarities at any position.
    margins = [[_dot(image, caption) - _dot(image, negative) for caption in captions[:-1]]]
    if len(captions) > len(("caption", "negative")):
        first, second = captions[0], captions[1]
        margins.append([_dot(first, second) - _dot(first, negative), _dot(first, second) - _dot(second, negative)])
    return [(min(task) > 0, min(task) == 0) for task in margins]


def _dot(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    return float(np.sum(left * right))
