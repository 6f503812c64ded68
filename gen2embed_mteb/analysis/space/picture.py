"""The picture of `analyze space`: a row for each dataset, a map for each prompt, with its numbers below."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.analysis.drawing.canvas import FAINT, INK, SOFT, Canvas, Point, shortened, text_width
from gen2embed_mteb.analysis.drawing.charts import legend
from gen2embed_mteb.analysis.drawing.colors import CLASSES, GRAY
from gen2embed_mteb.analysis.space.points import Points, kind_of
from gen2embed_mteb.analysis.space.projection import TITLES
from gen2embed_mteb.analysis.space.run import Panel, SpaceResult, cells_of
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers

Places = npt.NDArray[np.float64]

_SIDE, _GAP, _MARGIN, _TOP, _NUMBERS = 300, 36, 40, 84, 132
_FEWEST = 2
"""A class with fewer queries than this has no color of its own."""
_LINES = (
    ("distance of centroids", 0),
    ("cosine of pairs", 1),
    ("cosine of others", 2),
    ("gap of cosines", 3),
    ("side told by a classifier, %", 4),
    ("R@1, %", 5),
)


def picture(result: SpaceResult) -> Canvas:
    """Draw all panels.

    Args:
        result: What was measured; with maps.
    """
    columns = len(result.prompts)
    width = max(680, 2 * _MARGIN + columns * _SIDE + (columns - 1) * _GAP)
    row_height = 62 + _SIDE + _NUMBERS
    how = TITLES.get(result.projection, "no map")
    canvas = Canvas(
        width, _TOP + len(result.panels) * row_height + 16, f"The space of {result.model} by prompt ({how})"
    )
    canvas.text(_MARGIN, 42, "Queries and candidates, prompt by prompt", size=20, bold=True)
    about = f"{result.model}; {how} of each panel by itself: distances between panels, and their axes, mean nothing"
    canvas.text(_MARGIN, 64, shortened(about, width - 2 * _MARGIN, 12), color=SOFT)
    for number, row in enumerate(result.panels):
        top = _TOP + number * row_height
        _row(canvas, row, top)
    return canvas


def _row(canvas: Canvas, row: tuple[Panel, ...], top: float) -> None:
    points = row[0].points
    canvas.text(_MARGIN, top + 20, row[0].dataset, size=15, bold=True)
    colors, named = colors_of(points)
    counts = f"{len(points.queries)} queries ({kind_of(points.queries)}), "
    counts += f"{len(points.candidates)} candidates ({kind_of(points.candidates)})"
    room = canvas.width - 2 * _MARGIN
    entries = [(INK, "candidates")]
    entries += [(color, shortened(text, 90, 11)) for color, text in named[:5]] or [(CLASSES[0], "queries")]
    behind = text_width(row[0].dataset, 15) + 24
    canvas.text(_MARGIN + behind, top + 20, shortened(counts, room - behind, 11), size=11, color=SOFT)
    legend(canvas, _MARGIN, top + 42, entries, size=11)
    best = _best(row)
    for number, panel in enumerate(row):
        x, y = _MARGIN + number * (_SIDE + _GAP), top + 54
        canvas.rectangle(x, y, _SIDE, _SIDE, FAINT, radius=4, opacity=0.28)
        canvas.text(x + 10, y + 20, panel.prompt, size=13, bold=True)
        if panel.places is not None:
            _map(canvas, panel, panel.places, colors, (x, y))
        cells = cells_of(panel.numbers)
        for line, (label, place) in enumerate(_LINES):
            at = y + _SIDE + 20 + 17 * line
            canvas.text(x, at, label, size=11, color=SOFT)
            canvas.text(x + _SIDE, at, cells[place], size=12, anchor="end", bold=number in best.get(place, ()))


def _best(row: tuple[Panel, ...]) -> dict[int, set[int]]:
    """Return the panels that are best in the two figures of which more is better, by the number of the figure."""
    found: dict[int, set[int]] = {}
    for place, values in (
        (3, [panel.numbers.cosine_gap for panel in row]),
        (5, [panel.numbers.recall_at_1 for panel in row]),
    ):
        known = [value for value in values if value is not None]
        if len(row) > 1 and known:
            found[place] = {number for number, value in enumerate(values) if value == max(known)}
    return found


def _map(canvas: Canvas, panel: Panel, places: Places, colors: list[str], corner: Point) -> None:
    inner = _SIDE - 44
    low, high = places.min(axis=0), places.max(axis=0)
    scale = inner / max(float((high - low).max()), 1e-12)
    middle = (low + high) / 2
    x, y = corner
    across = x + _SIDE / 2 + (places[:, 0] - middle[0]) * scale
    down = y + _SIDE / 2 + 8 - (places[:, 1] - middle[1]) * scale
    spots: list[Point] = list(zip(across.tolist(), down.tolist(), strict=True))
    count = len(panel.points.queries)
    for query, candidate in panel.points.pairs.tolist():
        canvas.line([spots[query], spots[count + candidate]], INK, width=0.3, opacity=0.35)
    for color, (at, height) in zip(colors, spots[:count], strict=True):
        canvas.circle(at, height, 2.4, color, opacity=0.75)
    few = len(panel.points.candidates) <= len(CLASSES)
    for at, height in spots[count:]:
        canvas.circle(at, height, 4.2 if few else 2.0, INK, outline="#ffffff" if few else "", thick=1)


def colors_of(points: Points) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the color of each query, and the classes with a color of their own, the largest first.

    Queries of one positive are a class. The ten largest classes have colors; where every query has a positive of its
    own, all have one color, and no class is named.

    Args:
        points: The points of a dataset.
    """
    classes = points.classes
    largest = [one for one, count in Counter(classes).most_common(len(CLASSES)) if count >= _FEWEST]
    if len(largest) < 2 or len(points.candidates) > len(points.queries) / _FEWEST:
        return [CLASSES[0]] * len(classes), []
    color = dict(zip(largest, CLASSES, strict=False))
    named = [
        (color[one], drop_unmatched_markers(points.candidates[one].text, 0).strip() or f"class {one}")
        for one in largest
    ]
    return [color.get(one, GRAY) for one in classes], named
