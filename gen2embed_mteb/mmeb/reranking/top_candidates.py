"""The best candidates of a row by one score, and the row's outcome after another score has reordered them.

Order: by the second score; candidates of equal second score by the first one. All candidates behind the best k stay
behind them, in the order of the first score. A candidate that a row lists twice counts once, at its first place.

Official rule: of candidates that are equal in both scores, the one that stands first in the file is first, so that a
tie counts for the model (candidate 0 is the positive). Strict rule: a tie of both scores counts as a miss, also a tie
by which the positive came among the best k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TopCandidates:
    """The best k of a row's distinct candidates.

    Attributes:
        places: (k,) int64, where they stand in the row, the best first.
        scores: (k,) their scores.
        ahead: How many distinct candidates score higher than the positive.
        crowded: Whether k or more other candidates score as high as the positive, or higher.
    """

    places: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating]
    ahead: int
    crowded: bool

    @classmethod
    def of(cls, scores: npt.NDArray[np.floating], numbers: npt.NDArray[np.int64] | None, k: int) -> TopCandidates:
        """Choose the best k.

        Args:
            scores: (n,), those of the candidates; candidate 0 is the positive.
            numbers: (n,) int64, equal for equal candidates; None if no candidate is listed twice.
            k: How many, at least 1.
        """
        distinct = np.arange(len(scores))
        if numbers is not None:
            distinct = np.sort(np.unique(numbers, return_index=True)[1])
        order = distinct[np.argsort(-scores[distinct], kind="stable")][:k]
        others = scores[distinct[distinct != 0]]
        return cls(order, scores[order], int((others > scores[0]).sum()), int((others >= scores[0]).sum()) >= k)

    def reordered(self, second: npt.NDArray[np.floating]) -> tuple[int, bool]:
        """Return the rank of the positive after reordering, and the strict outcome.

        Args:
            second: (k,), the second scores, in the order of `places`.
        """
        found = np.flatnonzero(self.places == 0)
        if not len(found):
            return self.ahead, False
        own = int(found[0])
        first_higher, first_equal = self.scores > self.scores[own], self.scores == self.scores[own]
        equal = second == second[own]
        ahead = (second > second[own]) | (equal & first_higher)
        tied = equal & first_equal
        tied[own] = False
        return int(ahead.sum()), not (ahead | tied).any() and not self.crowded
