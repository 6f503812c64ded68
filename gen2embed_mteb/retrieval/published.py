"""What UniME's Table 2 prints beside our figures: recall at 1 both ways, SugarCrepe in groups; and what to know of it.

The figures themselves are in `paper_tables`.
"""

from __future__ import annotations

from gen2embed_mteb.paper_tables.averages import deviations
from gen2embed_mteb.paper_tables.published import published
from gen2embed_mteb.retrieval.scoring import DIRECTIONS

COLUMNS = {
    (dataset, direction): f"{dataset}.{key}"
    for dataset in ("flickr30k", "coco", "sharegpt4v", "urban1k")
    for direction, key in zip(DIRECTIONS, ("t2i", "i2t"), strict=True)
}
"""The key of the published table by dataset and direction, in its order."""

HEADS = (
    "The two directions are those of version 4 of UniME's paper; the picture in its README has their heads exchanged."
)
GAIN = (
    "In version 4, the gain (+11.3) beside UniME (Phi3.5-V) on Flickr30K is +8.3 by its own figures (77.0, against "
    "VLM2Vec's 68.7)."
)


def recall_at_1() -> dict[str, dict[str, float]]:
    """Return the figures of UniME and E5-V by row and key, in percent as printed."""
    return {
        name: {key: figure for key, figure in figures.items() if figure is not None}
        for name, figures in published("unime-diverse").methods.items()
        if name.startswith(("UniME", "E5-V"))
    }


def remarks() -> list[str]:
    """Return what must be said about UniME's figures, sentence by sentence."""
    rows = [one for one in deviations(published("unime-mmeb")) if one.name.startswith("UniME")]
    figures = ", ".join(f"{one.printed:.1f} ({one.over_datasets} over the 36)" for one in rows)
    mean = "UniME's overall figures on MMEB, but for LLaVA-OneVision's, are means of the four meta-tasks, not of the 36"
    return [HEADS, f"{mean} datasets: {figures}.", GAIN]
