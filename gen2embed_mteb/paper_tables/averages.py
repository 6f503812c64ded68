"""Checks the averages that published tables print against the columns of the same row.

MMEB's overall average is over 36 datasets: 10 of classification, 10 of VQA, 12 of retrieval, 4 of grounding; 20 are in
domain, 16 out of domain. So it follows from the columns of the meta-tasks, and from IND and OOD, up to rounding: each
column is rounded to 0.1, and so is the average, which makes 0.1 together.

Some printed averages do not follow. They are printed all the same, with a mark and a footnote that says what does
follow, and by which other rule the printed figure comes out, where one was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gen2embed_mteb.paper_tables.published import PublishedTable

META_TASKS = {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4}
"""How many of the 36 datasets are of each meta-task."""
DOMAINS = {"ind": 20, "ood": 16}
"""How many of the 36 datasets are in domain, and out of domain."""
TOLERANCE = 0.1 + 1e-6
"""The largest difference that rounding explains."""
NEAR = 0.2
"""Up to this difference a rule is named as near, though it does not give the printed figure."""

OTHER_RULES: dict[str, tuple[str, ...]] = {
    "the plain mean of the four meta-tasks": tuple(META_TASKS),
    "the plain mean of IND and OOD": tuple(DOMAINS),
}
"""Rules by which a printed average may have been made instead, each with the columns that it averages."""


@dataclass(frozen=True)
class Deviation:
    """A printed average that does not follow from the other columns of its row.

    Attributes:
        name: The row.
        printed: The average as printed.
        recomputed: What the columns give over the 36 datasets: by the meta-tasks, and by IND and OOD, where printed.
        rule: The rule that gives the printed figure, one of `OTHER_RULES`; empty if none was found.
        near: Where none was found: the rule that comes nearest, and what it gives; None if none is near.
    """

    name: str
    printed: float
    recomputed: tuple[float, ...]
    rule: str = ""
    near: tuple[str, float] | None = None

    @property
    def over_datasets(self) -> str:
        """What the columns give, with one decimal: one figure, or two where they differ."""
        shown = [f"{figure:.1f}" for figure in self.recomputed]
        if max(self.recomputed) - min(self.recomputed) > 2 * TOLERANCE:
            return f"{shown[0]} by meta-task and {shown[1]} by IND and OOD"
        return " to ".join(sorted(set(shown)))

    def __str__(self) -> str:
        """Return the whole finding as one sentence."""
        said = f"{self.name}: printed as {self.printed:.1f}; its own columns give {self.over_datasets} over 36 datasets"
        if self.rule:
            return f"{said}; the printed figure is {self.rule}"
        near = f" ({self.near[0]}, {self.near[1]:.2f}, is near)" if self.near else ""
        return f"{said}; no rule was found that gives the printed figure{near}"


def deviations(table: PublishedTable) -> list[Deviation]:
    """Return the averages of a table that do not follow from the other columns of their row, in the table's order.

    Args:
        table: Any published table; one without an overall average, or without other columns of MMEB, has none.
    """
    found = (_deviation(name, figures) for name, figures in table.methods.items())
    return [one for one in found if one is not None]


def _deviation(name: str, figures: Mapping[str, float | None]) -> Deviation | None:
    printed = figures.get("overall")
    if printed is None:
        return None
    recomputed = [_mean(figures, weights) for weights in (META_TASKS, DOMAINS)]
    given = tuple(mean for mean in recomputed if mean is not None)
    if all(abs(mean - printed) <= TOLERANCE for mean in given):
        return None
    others = {rule: _mean(figures, dict.fromkeys(columns, 1)) for rule, columns in OTHER_RULES.items()}
    by_distance = sorted((abs(mean - printed), rule, mean) for rule, mean in others.items() if mean is not None)
    distance, rule, mean = by_distance[0]
    if distance <= TOLERANCE:
        return Deviation(name, printed, given, rule)
    return Deviation(name, printed, given, near=(rule, mean) if distance <= NEAR else None)


def _mean(figures: Mapping[str, float | None], weights: Mapping[str, int]) -> float | None:
    """Return the weighted mean of some columns; None if one of them was not printed."""
    weighted = [(figures.get(name), weight) for name, weight in weights.items()]
    known = [(figure, weight) for figure, weight in weighted if figure is not None]
    if len(known) < len(weighted):
        return None
    return sum(figure * weight for figure, weight in known) / sum(weights.values())
