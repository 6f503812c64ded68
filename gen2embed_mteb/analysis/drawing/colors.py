"""Colors: those of kinds, which color-blind readers can tell apart (Okabe and Ito), and a scale from dark to light."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#98a2b3"

CLASSES = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)
"""Ten colors of classes; those of the paper's Fig. 4."""

_SCALE = np.array(
    [
        *([68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141]),
        *([39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]),
    ],
    dtype=np.float64,
)
"""Nine steps of the scale "viridis", which is in the public domain."""


def scaled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Return the colors of values, (..., 4) uint8 with red, green, blue and opacity.

    Args:
        values: Numbers in [0, 1], of any shape; NaN becomes a pixel that cannot be seen.
    """
    missing = np.isnan(values)
    place = np.clip(np.where(missing, 0, values), 0, 1) * (len(_SCALE) - 1)
    low = np.minimum(place.astype(np.int64), len(_SCALE) - 2)
    part = (place - low)[..., None]
    colors = _SCALE[low] * (1 - part) + _SCALE[low + 1] * part
    opacity = np.where(missing, 0, 255)[..., None]
    return np.concatenate([np.rint(colors), opacity], axis=-1).astype(np.uint8)
