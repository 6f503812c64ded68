"""Published recall at 1 of UniME and E5-V (arXiv 2504.17432v4, Table 2), in percent.

The README of UniME shows the same figures with the two directions exchanged in the heads of the columns; the paper's
fourth version prints them as here.
"""

from __future__ import annotations

COLUMNS = tuple(
    (dataset, direction)
    for dataset in ("flickr30k", "coco", "sharegpt4v", "urban1k")
    for direction in ("text_to_image", "image_to_text")
)
RECALL_AT_1: dict[str, tuple[float, ...]] = {
    "E5-V (Phi-3.5-V)": (72.2, 79.6, 44.7, 53.4, 86.0, 88.5, 83.8, 83.6),
    "UniME, stage 1 (Phi-3.5-V)": (72.0, 80.6, 44.9, 57.2, 86.8, 92.3, 85.1, 86.9),
    "UniME (Phi-3.5-V)": (77.0, 88.2, 49.8, 66.8, 92.1, 96.4, 92.7, 95.1),
    "E5-V (LLaVA-1.6)": (77.3, 85.7, 49.1, 57.6, 85.1, 82.1, 88.9, 83.2),
    "UniME, stage 1 (LLaVA-1.6)": (77.2, 84.6, 51.0, 56.4, 89.8, 86.9, 91.3, 82.4),
    "UniME (LLaVA-1.6)": (81.9, 93.4, 53.7, 70.1, 93.9, 97.2, 95.2, 95.9),
}
"""By method, the figures of `COLUMNS`."""
