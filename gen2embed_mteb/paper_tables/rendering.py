"""A table as text for a terminal, as Markdown, and as LaTeX with the rules of booktabs.

All three have a first column that says whose figures a row has, then the source's columns in the source's order.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby

from gen2embed_mteb.paper_tables.view import PUBLISHED, View, ViewRow

BY = "figures"
"""The head of the first column."""
WIDTH = 120
"""The longest line of a note in a terminal."""
_RAISED = dict(zip("abcdefgh", "ᵃᵇᶜᵈᵉᶠᵍʰ", strict=True))
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "✓": r"\checkmark{}",
    "✗": r"$\times$",
    "→": r"$\rightarrow$",
    "β": r"$\beta$",
    "–": "--",
}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def as_text(view: View) -> str:
    """Return a table for a terminal: aligned columns, then footnotes and notes; no newline at the end."""
    first = 1 + view.table.num_labels
    lines = [_cells(row, _raised) for row in view.rows]
    heads = [BY, *view.table.columns]
    widths = [max(len(line[column]) for line in [heads, *lines]) for column in range(len(heads))]
    spans = _spans(view)
    for head, start, count in spans:  # a head that is wider than its columns widens the last of them
        missing = len(head) - (sum(widths[start : start + count]) + 2 * (count - 1))
        widths[start + count - 1] += max(0, missing)

    def aligned(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column < first else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    above = [head.center(sum(widths[start : start + count]) + 2 * (count - 1)) for head, start, count in spans]
    top = ["  ".join(above).rstrip()] if view.table.spans else []
    body = [*top, aligned(heads)]
    rule = "-" * max(map(len, [*body, *map(aligned, lines)]))
    for group, rows in _groups(view):
        body += [rule, *([f"[{group}]"] if group else [])]
        body += [aligned(_cells(row, _raised)) for row in rows]
    below = (
        textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        for line in _below(view, _raised)
    )
    return "\n".join([view.heading, f"({view.table.source})", "", *body, rule, *below])


def as_markdown(view: View) -> str:
    """Return a table in GitHub's Markdown, with a newline at the end."""
    first = 1 + view.table.num_labels
    heads = [BY, *_joined_heads(view)]
    rule = ["---" if column < first else "---:" for column in range(len(heads))]
    lines = [heads, rule]
    for group, rows in _groups(view):
        lines += [[f"*{group}*", *[""] * (len(heads) - 1)]] if group else []
        lines += [_cells(row, _raised) for row in rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    below = [f"- {line}" for line in _below(view, _raised)]
    return "\n\n".join([f"# {view.heading}", f"Source of the published rows: {view.table.source}.", table]) + (
        "\n\n" + "\n".join(below) + "\n" if below else "\n"
    )


def as_latex(view: View) -> str:
    r"""Return a table as LaTeX, for a document with `\usepackage{booktabs}` and `\usepackage{amssymb}`."""
    num_columns, first = 1 + len(view.table.columns), 1 + view.table.num_labels
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_escaped(view.heading)} ({_escaped(view.table.source)}).}}",
    ]
    lines += [rf"\label{{tab:{view.table.name.lower()}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * first}{'r' * (num_columns - first)}}}", r"\toprule"]
    if view.table.spans:
        spans = _spans(view)
        above = (rf"\multicolumn{{{count}}}{{c}}{{{_escaped(head)}}}" for head, _, count in spans)
        lines.append(" & ".join(above) + r" \\")
        lines += [rf"\cmidrule(lr){{{start + 1}-{start + count}}}" for head, start, count in spans if head]
    lines.append(" & ".join(map(_escaped, [BY, *view.table.columns])) + r" \\")
    for group, rows in _groups(view):
        lines.append(r"\midrule")
        lines += [rf"\multicolumn{{{num_columns}}}{{l}}{{\emph{{{_escaped(group)}}}}} \\"] if group else []
        lines += [" & ".join(_cells(row, _superscript, _escaped)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    below = [
        *(_superscript(mark) + " " + _escaped(text) for mark, text in view.footnotes.items()),
        *map(_escaped, view.notes),
    ]
    if below:
        lines += ["", r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", " \\\\\n".join(below)]
        lines.append(r"\end{minipage}")
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def _cells(row: ViewRow, mark: Callable[[str], str], plain: Callable[[str], str] = str) -> list[str]:
    """Return the cells of a row with the first column and the marks."""
    by = row.by if row.by == PUBLISHED else f"here: {row.by}"
    marked = (plain(cell) + (mark(row.marks[at]) if at in row.marks else "") for at, cell in enumerate(row.cells))
    return [plain(by), *marked]


def _groups(view: View) -> list[tuple[str, list[ViewRow]]]:
    return [(group, list(rows)) for group, rows in groupby(view.rows, key=lambda row: row.group)]


def _spans(view: View) -> list[tuple[str, int, int]]:
    """Return the heads above the heads, each with its first column and their number; the first column is ours."""
    found, start = [("", 0, 1)], 1
    for head, count in view.table.spans:
        found.append((head, start, count))
        start += count
    return found if view.table.spans else []


def _joined_heads(view: View) -> list[str]:
    """Return one head per column, for forms that have no heads above heads."""
    above = [head for head, count in view.table.spans for _ in range(count)] if view.table.joined else []
    heads = view.table.columns
    return [" ".join(filter(None, pair)) for pair in zip(above, heads, strict=True)] if above else list(heads)


def _below(view: View, mark: Callable[[str], str]) -> list[str]:
    return [*(f"{mark(letter)} {text}" for letter, text in view.footnotes.items()), *view.notes]


def _raised(mark: str) -> str:
    return _RAISED[mark]


def _superscript(mark: str) -> str:
    return rf"\textsuperscript{{{mark}}}"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(lambda found: _LATEX[found[0]], text)
