"""Charts on a canvas: lines over a numbered axis, and a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gen2embed_mteb.analysis.drawing.canvas import FAINT, INK, SOFT, Canvas, text_width


class Box(NamedTuple):
    """A rectangle of a canvas."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Series:
    """Values over the numbers of layers.

    Attributes:
        values: (number, value) of each point.
        color: Its color.
        dashed: Whether the line is dashed.
    """

    values: tuple[tuple[int, float], ...]
    color: str
    dashed: bool = False


def line_chart(canvas: Canvas, box: Box, series: Sequence[Series], title: str, *, log: bool = False) -> None:
    """Draw lines, with axes and a title above.

    Args:
        canvas: Where.
        box: The rectangle of the plot itself; labels stand outside of it.
        series: The lines.
        title: What the values are.
        log: Whether the values are on a logarithmic scale; values of 0 and below are then left out.
    """
    canvas.text(box.x, box.y - 12, title, size=13, bold=True)
    kept = [
        (one, [(x, math.log10(y) if log else y) for x, y in one.values if not log or y > 0])
        for one in series
        if one.values
    ]
    points = [point for _, found in kept for point in found]
    if not points:
        return
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if not log:
        low, high = min(0.0, low), max(high, 1e-12)
    ticks = _log_ticks(low, high) if log else _ticks(low, high)
    low, high = min(low, *(at for at, _ in ticks)), max(high, *(at for at, _ in ticks))
    span = high - low or 1.0

    def spot(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return box.x + across * box.width, box.y + box.height * (1 - (y - low) / span)

    for at, label in ticks:
        _, y = spot(first, at)
        canvas.line([(box.x, y), (box.x + box.width, y)], FAINT)
        canvas.text(box.x - 6, y + 4, label, size=10, color=SOFT, anchor="end")
    step = max(1, math.ceil((last - first) / 8))
    for number in range(first, last + 1, step):
        x, _ = spot(number, low)
        canvas.text(x, box.y + box.height + 16, str(number), size=10, color=SOFT, anchor="middle")
    canvas.text(box.x + box.width / 2, box.y + box.height + 31, "layer", size=10, color=SOFT, anchor="middle")
    for one, found in kept:
        placed = [spot(x, y) for x, y in found]
        if len(placed) > 1:
            canvas.line(placed, one.color, width=1.6 if one.dashed else 2.2, dash=4 if one.dashed else 0)
        if not one.dashed:
            for x, y in placed:
                canvas.circle(x, y, 2.6, one.color)


def legend(canvas: Canvas, x: float, y: float, entries: Sequence[tuple[str, str]], *, size: float = 12) -> float:
    """Draw a legend on one line, and return where it ends.

    Args:
        canvas: Where.
        x: Its left edge.
        y: Its baseline.
        entries: (color, label) of each; a color that begins with "-" stands for a dashed line of the rest.
        size: That of the text.
    """
    for color, label in entries:
        if color.startswith("-"):
            canvas.line([(x, y - 4), (x + 18, y - 4)], color[1:], width=1.6, dash=4)
            x += 24
        else:
            canvas.rectangle(x, y - 10, 11, 11, color, radius=2)
            x += 17
        canvas.text(x, y, label, size=size, color=INK)
        x += text_width(label, size) + 20
    return x


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return about four round numbers that cover a range, and their labels."""
    rough = (high - low) / 4 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough)
    numbers = range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)
    return [(number * step, f"{number * step:.6g}") for number in numbers]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return powers of ten that cover a range of logarithms, with steps between them where there are few."""
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    steps: tuple[int, ...] = (1, 2, 5) if high - low <= 1.3 else (1, 3) if high - low <= 3 else (1,)
    every = max(1, math.ceil((last - first) / 5))
    marks = [math.log10(step) + power for power in range(first, last + 1, every) for step in steps]
    inside = [mark for mark in marks if low - 0.31 <= mark <= high + 0.31] or marks
    return [(mark, f"{10**mark:.3g}") for mark in inside]
