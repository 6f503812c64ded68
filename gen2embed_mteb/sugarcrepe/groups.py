"""SugarCrepe in UniME's grouping, with UniME's published figures (arXiv 2504.17432v4, Table 3), in percent.

UniME compares an image with its captions under prompts for one image or one text, without a request in words; so the
captions have no prefix there (`--plain_captions`). Its "compositional" figure is the mean of the three groups, whereas
the Gen2Embed paper averages the seven sets.
"""

from __future__ import annotations

from collections.abc import Mapping

GROUPS: dict[str, tuple[str, ...]] = {
    "Replace": ("replace_obj", "replace_att", "replace_rel"),
    "Swap": ("swap_obj", "swap_att"),
    "Add": ("add_obj", "add_att"),
}
"""The groups of SugarCrepe's sets in UniME's tables."""
UNIME: dict[str, tuple[float, float, float]] = {
    "E5-V (Phi-3.5-V)": (88.2, 66.6, 75.3),
    "UniME, stage 1 (Phi-3.5-V)": (90.2, 67.6, 91.2),
    "UniME (Phi-3.5-V)": (90.1, 70.9, 93.3),
    "E5-V (LLaVA-1.6)": (86.3, 68.7, 66.9),
    "UniME, stage 1 (LLaVA-1.6)": (89.5, 64.8, 94.2),
    "UniME (LLaVA-1.6)": (89.0, 71.5, 94.4),
}
"""Accuracy by group; how sets are averaged inside a group is not said, and taken as unweighted here."""


def of_groups(accuracies: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the mean accuracy of each group, all of whose sets must have been scored, else None.

    Args:
        accuracies: In [0, 1], by set.
    """
    means: dict[str, float | None] = {}
    for group, sets in GROUPS.items():
        figures = [accuracies.get(name) for name in sets]
        known = [figure for figure in figures if figure is not None]
        means[group] = sum(known) / len(known) if len(known) == len(figures) else None
    return means
