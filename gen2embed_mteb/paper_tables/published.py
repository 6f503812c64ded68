"""The published tables, with every figure as it was printed: the paper's Tables II to VIII, and UniME's Tables 1 and 2.

The figures are in `data/`, one file per source, in the source's own layout and order. All other code takes published
figures from here (`evaluation/paper.py` too), so that none is written down twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

NAMES = ("II", "III", "IV", "V", "VI", "VII", "VIII", "unime-diverse", "unime-mmeb")
"""The tables: Roman numerals are those of the paper, the others are UniME's."""

_FILES = ("gen2embed.json", "unime.json")
_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        name: A name that no other row of the table has.
        labels: The cells of the first columns, as they were printed.
        figures: The figures in percent (training time in hours) by key; None where a dash was printed.
        group: The heading that the row stands under, or empty.
        backbone: The model that was measured, where we need it; else empty.
        prompt_mode: The strategy with which our own code measures the same, if there is one; else empty.
        remark: What else is known about the row's average, as a sentence without its end; else empty.
    """

    name: str
    labels: tuple[str, ...]
    figures: Mapping[str, float | None]
    group: str = ""
    backbone: str = ""
    prompt_mode: str = ""
    remark: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """A published table.

    Attributes:
        name: One of `NAMES`.
        source: The publication.
        title: What the table shows, in our words.
        columns: The heads of all columns, in the source's order.
        num_labels: How many columns at the left hold labels rather than figures.
        keys: The keys of the columns of figures.
        rows: The rows in the source's order.
        spans: The heads above the heads, each with the number of columns that it spans; empty if there are none.
        joined: Whether a column's head is clear only together with the head above it.
        decimals: How many decimals the source prints.
        metrics: In a table that has a row per metric and a column per method: the metrics, by row; else empty.
    """

    name: str
    source: str
    title: str
    columns: tuple[str, ...]
    num_labels: int
    keys: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    spans: tuple[tuple[str, int], ...] = ()
    joined: bool = False
    decimals: int = 1
    metrics: tuple[str, ...] = ()

    def row(self, name: str) -> PublishedRow:
        """Return the row of a name.

        Raises:
            KeyError: There is none.
        """
        return {row.name: row for row in self.rows}[name]

    @property
    def methods(self) -> dict[str, dict[str, float | None]]:
        """The figures of each method by key; methods are rows, or columns in a table that has a row per metric."""
        if not self.metrics:
            return {row.name: dict(row.figures) for row in self.rows}
        by_metric = dict(zip(self.metrics, self.rows, strict=True))
        return {key: {metric: row.figures[key] for metric, row in by_metric.items()} for key in self.keys}


def published(name: str) -> PublishedTable:
    """Return a published table.

    Args:
        name: One of `NAMES`.

    Raises:
        Gen2EmbedError: There is no table of that name.
    """
    if name not in NAMES:
        raise Gen2EmbedError(f"there is no table {name!r}; known: {', '.join(NAMES)}")
    return _tables()[name]


@functools.cache
def _tables() -> dict[str, PublishedTable]:
    tables: dict[str, PublishedTable] = {}
    for file in _FILES:
        content = json.loads((_DATA / file).read_bytes())
        tables |= {name: _table(name, content["source"], table) for name, table in content["tables"].items()}
    return tables


def _table(name: str, source: str, content: Mapping[str, Any]) -> PublishedTable:
    lists = {field: tuple(content[field]) for field in ("columns", "keys", "metrics") if field in content}
    plain = {field: content[field] for field in ("title", "num_labels", "joined", "decimals") if field in content}
    spans = tuple((head, count) for head, count in content.get("spans", ()))
    fields: dict[str, Any] = {
        **lists,
        **plain,
        "rows": tuple(_row(row, lists["keys"]) for row in content["rows"]),
        "spans": spans,
    }
    return PublishedTable(name=name, source=source, **fields)


def _row(content: Mapping[str, Any], keys: tuple[str, ...]) -> PublishedRow:
    figures = dict(zip(keys, content["figures"], strict=True))
    others = {name: content[name] for name in ("name", "group", "backbone", "prompt_mode", "remark") if name in content}
    return PublishedRow(labels=tuple(content["labels"]), figures=figures, **others)
