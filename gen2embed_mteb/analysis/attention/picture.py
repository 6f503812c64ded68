"""The picture of `analyze attention`: heat maps as in the paper's Fig. 1, and below them the figures by layer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from gen2embed_mteb.analysis.attention.figures import SegmentFigures
from gen2embed_mteb.analysis.attention.measure import LayerAttention
from gen2embed_mteb.analysis.attention.run import AttentionResult, Measured
from gen2embed_mteb.analysis.attention.segments import IMAGE, SYSTEM, USER
from gen2embed_mteb.analysis.drawing.canvas import FAINT, INK, SOFT, Canvas, shortened
from gen2embed_mteb.analysis.drawing.charts import Box, Series, legend, line_chart
from gen2embed_mteb.analysis.drawing.colors import BLUE, GREEN, ORANGE, scaled

COLORS = {SYSTEM: BLUE, IMAGE: ORANGE, USER: GREEN}
_WIDTH, _MARGIN, _MAP, _STRIP = 1040, 40, 286, 9
_DECADES = 4.0
"""How many powers of ten the scale of a heat map has below its largest value."""


def picture(result: AttentionResult) -> Canvas:
    """Draw up to three heat maps of the first input, and the figures of all inputs by layer.

    Args:
        result: What was measured.
    """
    shown = result.measured[0][0]
    height = 900 + (44 + 28 * len(result.place_names) if result.system else 0)
    canvas = Canvas(_WIDTH, height, f"Attention of {result.model}, prompt {result.prompt_mode}")
    canvas.text(_MARGIN, 42, "Where the attention goes", size=20, bold=True)
    about = f"{result.model}, prompt {result.prompt_mode}: {result.inputs[0]} ({shown.num_tokens} tokens)"
    canvas.text(_MARGIN, 64, shortened(about, _WIDTH - 2 * _MARGIN, 12), color=SOFT)
    legend(canvas, _MARGIN, 92, [(COLORS[name], f"{name} ({mask.sum()})") for name, mask in shown.segments.items()])
    chosen = _chosen(shown.layers)
    low, high = _range(chosen)
    for number, layer in enumerate(chosen):
        _heat_map(canvas, _MARGIN + number * (_MAP + 51), 150, layer=layer, shown=shown, low=low, high=high)
    _scale(canvas, 150 + _MAP + 46, low, high)
    _charts(canvas, result, 600)
    if result.system:
        _places(canvas, result, 900)
    return canvas


def _chosen(layers: list[LayerAttention]) -> list[LayerAttention]:
    """Return the first layer, the one after a third (the ninth of 28 is the paper's), and the last."""
    places = sorted({0, round(8 / 27 * (len(layers) - 1)), len(layers) - 1})
    return [layers[place] for place in places]


def _range(layers: list[LayerAttention]) -> tuple[float, float]:
    """Return the logarithms between which the colors run."""
    values = np.concatenate([layer.pooled[layer.pooled > 0] for layer in layers])
    high = math.log10(float(values.max()))
    return max(high - _DECADES, math.log10(float(values.min()))), high


def _heat_map(
    canvas: Canvas, x: float, y: float, *, layer: LayerAttention, shown: Measured, low: float, high: float
) -> None:
    canvas.text(x, y - 26, f"layer {layer.layer}", size=13, bold=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = (np.log10(layer.pooled) - low) / max(high - low, 1e-9)
    # Attention of 0, where something could be seen, has the darkest color.
    values = np.where(np.isnan(layer.pooled), np.nan, np.where(np.isfinite(values), values, 0))
    canvas.image(x + _STRIP + 3, y, _MAP, _MAP, Image.fromarray(scaled(values), "RGBA"), pixelated=True)
    block = math.ceil(shown.num_tokens / len(values))
    total = block * len(values)
    for name, mask in shown.segments.items():
        for first, behind in _runs(mask):
            start, length = _MAP * first / total, _MAP * (behind - first) / total
            canvas.rectangle(x, y + start, _STRIP, length, COLORS[name])
            canvas.rectangle(x + _STRIP + 3 + start, y - _STRIP - 3, length, _STRIP, COLORS[name])
    if layer is shown.layers[0]:
        canvas.text(x - 8, y + _MAP / 2, "row: the token that reads", size=10, color=SOFT, anchor="middle", upward=True)
        middle = x + _STRIP + 3 + _MAP / 2
        canvas.text(middle, y + _MAP + 18, "column: the token that is read", size=10, color=SOFT, anchor="middle")


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return where the runs of true values begin, and where they have ended."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(first), int(behind)) for first, behind in zip(edges[::2], edges[1::2], strict=True)]


def _scale(canvas: Canvas, y: float, low: float, high: float) -> None:
    """Draw what the colors of the heat maps mean."""
    x, width = _MARGIN + _STRIP + 3, 220
    colors = scaled(np.linspace(0, 1, 110)[None])
    canvas.image(x, y, width, 10, Image.fromarray(colors, "RGBA"), pixelated=True)
    for power in range(math.ceil(low), math.floor(high) + 1):
        at = x + width * (power - low) / max(high - low, 1e-9)
        canvas.line([(at, y + 10), (at, y + 14)], SOFT)
        canvas.text(at, y + 27, f"{10.0**power:g}", size=10, color=SOFT, anchor="middle")
    canvas.text(
        x + width + 14, y + 9, "attention of a token to a token, mean over heads and a block", size=10, color=SOFT
    )


def _charts(canvas: Canvas, result: AttentionResult, y: float) -> None:
    layers = result.layers()
    names = [name for name in COLORS if any(name in figures for figures in layers.values())]

    def series(field: str, name: str, *, dashed: bool = False, factor: float = 1) -> Series:
        values = ((number, factor * getattr(found[name], field)) for number, found in layers.items() if name in found)
        return Series(tuple(values), COLORS[name], dashed)

    def box(number: int) -> Box:
        return Box(_MARGIN + 32 + number * (_MAP + 51), y, _MAP - 32, 190)

    both = [series("efficiency", name) for name in names] + [series("uniform", name, dashed=True) for name in names]
    line_chart(canvas, box(0), both, "1. Eq. 1 as defined", log=True)
    even = Series(tuple((number, 1.0) for number in layers), SOFT, dashed=True)
    line_chart(
        canvas, box(1), [even, *(series("over_uniform", name) for name in names)], "2. divided by uniform", log=True
    )
    last = [series("last_row", name, factor=100) for name in names]
    last += [series("last_row_without_first", name, dashed=True, factor=100) for name in names]
    line_chart(canvas, box(2), last, "3. the last row alone, %")
    notes = ("dashed: uniform attention", "dashed: 1, as if uniform", "dashed: without token 0")
    for number, note in enumerate(notes):
        canvas.text(box(number).x, y + 190 + 54, note, size=10, color=SOFT)
    many = len(result.inputs)
    canvas.text(
        _MARGIN, y - 48, f"By layer{f', mean of {many} inputs' if many > 1 else ''}", size=15, bold=True, color=INK
    )


def _places(canvas: Canvas, result: AttentionResult, y: float) -> None:
    """Draw what the prompt's words receive in each place."""
    canvas.text(_MARGIN, y, "The same words in three places, mean over layers", size=15, bold=True)
    kinds: tuple[tuple[str, Callable[[SegmentFigures], float], str], ...] = (
        ("Eq. 1", lambda one: one.efficiency, "{:.2g}"),
        ("divided by uniform", lambda one: one.over_uniform, "{:.2f}"),
        ("the last row, %", lambda one: 100 * one.last_row, "{:.1f}"),
    )
    found: list[SegmentFigures] = [
        result.overall(number, words=True)["words"] for number in range(len(result.place_names))
    ]
    left, wide = 250, 240
    for column, (label, value, shape) in enumerate(kinds):
        x = left + column * (wide + 20)
        canvas.text(x, y + 26, label, size=11, color=SOFT)
        most = max(value(one) for one in found) or 1.0
        for number, one in enumerate(found):
            top = y + 36 + 28 * number
            canvas.rectangle(x, top, max(1.0, (wide - 70) * value(one) / most), 16, BLUE, radius=2, opacity=0.8)
            canvas.text(x + (wide - 70) * value(one) / most + 6, top + 12.5, shape.format(value(one)), size=11)
    for number, name in enumerate(result.place_names):
        top = y + 36 + 28 * number
        canvas.text(_MARGIN, top + 12.5, name, size=12)
        if number:
            canvas.line([(_MARGIN, top - 6), (_WIDTH - _MARGIN, top - 6)], FAINT, width=0.6)
