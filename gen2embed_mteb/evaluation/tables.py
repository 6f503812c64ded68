"""Tables of figures as text: percent, Markdown, and aligned columns for a terminal."""

from __future__ import annotations

Table = list[list[str]]
"""Rows of cells, all with the same number of cells; the first row is the header, the first column holds the labels."""


def percent(figure: float | None) -> str:
    """Return a figure in [0, 1] as percent with one decimal; a dash for None."""
    return "–" if figure is None else f"{100 * figure:.1f}"


def as_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown, labels aligned left and figures right; no newline at the end."""
    rule = ["---" if not column else "---:" for column in range(len(table[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [table[0], rule, *table[1:]])


def as_text(table: Table) -> str:
    """Return a table with aligned columns for a terminal, and a line under the header; no newline at the end."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
