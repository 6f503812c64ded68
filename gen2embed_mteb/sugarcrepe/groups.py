"""SugarCrepe in UniME's grouping, with UniME's published figures (arXiv 2504.17432v4, Table 2), in percent.

UniME compares an image with its captions under prompts for one image or one text, without a request in words; so the
captions have no prefix there (`--plain_captions`). Its "compositional" figure is the mean of the three groups, whereas
the Gen2Embed paper averages the seven sets.
"""

from __future__ import annotations

from collections.abc import Mapping

from gen2embed_mteb.paper_tables.published import published

GROUPS: dict[str, tuple[str, ...]] = {
    "Replace": ("replace_obj", "replace_att", "replace_rel"),
    "Swap": ("swap_obj", "swap_att"),
    "Add": ("add_obj", "add_att"),
}
"""The groups of SugarCrepe's sets in UniME's tables."""


def published_groups() -> dict[str, tuple[float, ...]]:
    """Return UniME's and E5-V's accuracy of each of `GROUPS`, as printed.

    How sets are averaged inside a group is not said, and taken as unweighted here.
    """
    rows = published("unime-diverse").methods.items()
    return {
        name: tuple(figures[f"sugarcrepe.{group.lower()}"] or 0.0 for group in GROUPS)
        for name, figures in rows
        if name.startswith(("UniME", "E5-V"))
    }


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
