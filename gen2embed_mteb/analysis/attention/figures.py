"""Figures per segment: Eq. 1 as the paper defines it, the same over its uniform value, and the last row alone.

Eq. 1: ε of a segment is what its tokens receive from all rows together, divided by their number. Tokens at the
beginning are seen by every row, those at the end by few; so ε falls with the position even where every row spreads its
attention evenly. `over_uniform` divides that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from gen2embed_mteb.analysis.attention.measure import LayerAttention
from gen2embed_mteb.analysis.attention.segments import Mask


@dataclass(frozen=True)
class SegmentFigures:
    """The attention that one segment receives in one layer.

    Attributes:
        tokens: How many tokens it has.
        first: The place of the first of them.
        efficiency: ε of Eq. 1.
        uniform: ε if every row spread its attention evenly over the tokens that it may see.
        over_uniform: `efficiency` divided by `uniform`.
        last_row: The share of the last row's attention, in [0, 1].
        last_row_without_first: The same of what the last row leaves for all tokens but the first one, which most
            models use as a sink.
    """

    tokens: float
    first: float
    efficiency: float
    uniform: float
    over_uniform: float
    last_row: float
    last_row_without_first: float


def figures_of(layer: LayerAttention, segments: Mapping[str, Mask]) -> dict[str, SegmentFigures]:
    """Return the figures of each segment.

    Args:
        layer: The attention of a layer.
        segments: (n,) bool for each segment; together they cover every token once.
    """
    rest = layer.last.copy()
    rest[0] = 0
    rest /= max(rest.sum(), np.finfo(np.float64).tiny)
    found = {}
    for name, mask in segments.items():
        efficiency, uniform = float(layer.received[mask].mean()), float(layer.uniform[mask].mean())
        found[name] = SegmentFigures(
            tokens=float(mask.sum()),
            first=float(np.flatnonzero(mask)[0]),
            efficiency=efficiency,
            uniform=uniform,
            over_uniform=efficiency / uniform,
            last_row=float(layer.last[mask].sum()),
            last_row_without_first=float(rest[mask].sum()),
        )
    return found


def averaged(figures: Sequence[Mapping[str, SegmentFigures]]) -> dict[str, SegmentFigures]:
    """Return the means of figures of several inputs, or of several layers.

    Args:
        figures: Figures by segment; an input that lacks a segment does not count there.
    """
    names = dict.fromkeys(name for one in figures for name in one)
    found = {}
    for name in names:
        rows = [asdict(one[name]) for one in figures if name in one]
        found[name] = SegmentFigures(**{key: float(np.mean([row[key] for row in rows])) for key in rows[0]})
    return found
