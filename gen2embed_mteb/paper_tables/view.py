"""A published table with our rows in it, ready to be printed: which rows, in which order, with which marks.

Our rows stand under the published row that they repeat, or at the end. Published figures are never changed: an average
that does not follow from its own columns has a mark, and a footnote says what does follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gen2embed_mteb.paper_tables.averages import Deviation, deviations
from gen2embed_mteb.paper_tables.published import PublishedTable

PUBLISHED = "published"
"""What the first column says of a published row; of ours it names the model."""
RUN_HERE = "Run here"
"""The heading over our rows that stand at the end."""
NONE = "–"
_MARKS = "abcdefgh"


@dataclass(frozen=True)
class OurFigures:
    """Figures that were measured here.

    Attributes:
        model: The model.
        labels: The cells of the label columns; not used in a table that has a row per metric.
        figures: The figures in percent (training time in hours) by key.
        after: The published row under which they are shown, empty for the end of the table; in a table that has a row
            per metric, the key of their column.
    """

    model: str
    labels: tuple[str, ...]
    figures: Mapping[str, float | None]
    after: str = ""


@dataclass(frozen=True)
class ViewRow:
    """A row as it is printed.

    Attributes:
        by: `PUBLISHED`, or the model of ours.
        cells: The cells of all columns of the source, without marks.
        figures: The figures by key.
        group: The heading that it stands under; empty if it has none.
        marks: The letter of a footnote by the number of the column.
    """

    by: str
    cells: tuple[str, ...]
    figures: Mapping[str, float | None]
    group: str = ""
    marks: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A table as it is printed.

    Attributes:
        table: The published table.
        rows: All rows, in order.
        notes: What must be known to read it, sentence by sentence.
        footnotes: The text of each mark.
    """

    table: PublishedTable
    rows: tuple[ViewRow, ...]
    notes: tuple[str, ...]
    footnotes: Mapping[str, str]

    @property
    def heading(self) -> str:
        """Which table it is, with its title."""
        number = {"unime-mmeb": "UniME's Table 1", "unime-diverse": "UniME's Table 2"}
        return f"{number.get(self.table.name, f'Table {self.table.name}')}: {self.table.title}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON: figures as numbers, in percent."""
        table, first = self.table, self.table.num_labels
        return {
            "table": table.name,
            "title": table.title,
            "source": table.source,
            "columns": [*table.columns[:first], *table.keys],
            "notes": list(self.notes),
            "footnotes": dict(self.footnotes),
            "rows": [
                {
                    "by": row.by,
                    "group": row.group,
                    "labels": list(row.cells[:first]),
                    "figures": dict(row.figures),
                    "marks": {table.keys[column - first]: mark for column, mark in row.marks.items()},
                }
                for row in self.rows
            ],
        }


def view_of(table: PublishedTable, ours: Sequence[OurFigures], notes: Sequence[str]) -> View:
    """Return a published table with our figures in it.

    Args:
        table: The published table.
        ours: Our figures, in the order in which they are to stand under one row.
        notes: What must be known to read the table.
    """
    marked, footnotes = _marks(table)
    rows: list[ViewRow] = []
    for number, published in enumerate(table.rows):
        at = {table.num_labels + table.keys.index(key): mark for key, mark in marked.get(published.name, {}).items()}
        cells = _cells(table, published.labels, published.figures)
        rows.append(ViewRow(PUBLISHED, cells, dict(published.figures), published.group, at))
        if table.metrics:
            rows += _under_metric(table, table.metrics[number], published.labels, ours)
        else:
            rows += [
                ViewRow(one.model, _cells(table, one.labels, one.figures), _known(table, one), published.group)
                for one in ours
                if one.after == published.name
            ]
    if not table.metrics:
        rows += [
            ViewRow(one.model, _cells(table, one.labels, one.figures), _known(table, one), RUN_HERE)
            for one in ours
            if not one.after
        ]
    return View(table, tuple(rows), tuple(notes), footnotes)


def shown(figure: float | None, key: str, decimals: int) -> str:
    """Return a figure as the tables print it: percent with the source's decimals; hours, also short ones."""
    if figure is None:
        return NONE
    if key == "hours" and figure < 1:
        return f"{figure:.2g}"
    return f"{figure:.{decimals}f}"


def _under_metric(
    table: PublishedTable, metric: str, labels: tuple[str, ...], ours: Sequence[OurFigures]
) -> list[ViewRow]:
    """Return a row per model with one metric of all its figures, by column."""
    rows = []
    for model in dict.fromkeys(one.model for one in ours):
        figures: dict[str, float | None] = dict.fromkeys(table.keys) | {
            one.after: one.figures.get(metric) for one in ours if one.model == model
        }
        rows.append(ViewRow(model, _cells(table, labels, figures), figures))
    return rows


def _cells(table: PublishedTable, labels: tuple[str, ...], figures: Mapping[str, float | None]) -> tuple[str, ...]:
    return (*labels, *(shown(figures.get(key), key, table.decimals) for key in table.keys))


def _known(table: PublishedTable, ours: OurFigures) -> dict[str, float | None]:
    return {key: ours.figures.get(key) for key in table.keys}


def _marks(table: PublishedTable) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the marks by row and key, and the footnotes: one for each way in which averages do not follow."""
    by_rule: dict[str, list[Deviation]] = {}
    for deviation in deviations(table):
        by_rule.setdefault(deviation.rule, []).append(deviation)
    marked: dict[str, dict[str, str]] = {}
    footnotes = {}
    for mark, (rule, found) in zip(_MARKS, by_rule.items(), strict=False):
        for deviation in found:
            marked[deviation.name] = {"overall": mark}
        values = "; ".join(_recomputed(table, deviation) for deviation in found)
        why = f"it is {rule}" if rule else "no rule was found that gives it"
        footnotes[mark] = (
            f"Printed as published, but it does not follow from the row's other columns; {why}. Over the 36 datasets "
            f"these columns give: {values}."
        )
    return marked, footnotes


def _recomputed(table: PublishedTable, deviation: Deviation) -> str:
    """Return a row's name, what its columns give, and what else is known."""
    known = [f"{deviation.near[0]}, {deviation.near[1]:.2f}, is near"] if deviation.near else []
    remark = table.row(deviation.name).remark
    known += [remark] if remark else []
    return f"{deviation.name} {deviation.over_datasets}" + (f" ({'; '.join(known)})" if known else "")
