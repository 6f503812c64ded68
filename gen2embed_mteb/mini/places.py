"""The folders of MMEB-mini and SugarCrepe-mini, below the root that they are drawn into."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

EVAL_TABLES = "MMEB-eval"
EVAL_TABLES_V2 = "MMEB-eval-V2"
EVAL_IMAGES = "images"
TRAIN_TABLES = "MMEB-train"
TRUTH = "truth"
SUGARCREPE = "SugarCrepe"
SUGARCREPE_PLUS = "SugarCrepe++"
CREPE_IMAGES = "val2017"
DIVERSE = "diverse"


class Places(NamedTuple):
    """The folders of a benchmark's tables and of its images."""

    data_dir: Path
    image_dir: Path


def evaluation_places(root: Path) -> Places:
    """Return the folders of MMEB-mini's evaluation tables and images."""
    return Places(root / EVAL_TABLES, root / EVAL_IMAGES)


def crepe_places(root: Path, *, plus: bool) -> Places:
    """Return the folders of the caption sets and images of SugarCrepe-mini, or of SugarCrepe++-mini."""
    return Places(root / (SUGARCREPE_PLUS if plus else SUGARCREPE), root / CREPE_IMAGES)
