"""SugarCrepe as a part of `diverse`: where its files and images are, and the settings of its part of the run.

It is run as UniME does: captions without a prefix, in UniME's three groups.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.evaluation.applied_calibration import refuse_comparison
from gen2embed_mteb.hub.addresses import local_place
from gen2embed_mteb.mmeb.datasets import matches
from gen2embed_mteb.sugarcrepe.evaluate import set_file
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_BENCHMARK

SUGARCREPE = SUGARCREPE_BENCHMARK.name
DIVERSE = "diverse"
FOLDERS = ("sugarcrepe", "SugarCrepe", "sugar-crepe")
"""Names of its folder below the folder of several datasets."""
IMAGES = ("val2017", "val2017.zip")
"""Names of the folder or archive of its images, COCO's of 2017."""


def sugarcrepe_part(name: str, config: EvaluationConfig) -> EvaluationConfig | None:
    """Return the settings of SugarCrepe's part of a run; None if it has none.

    Args:
        name: The benchmark; `diverse` alone has this part.
        config: The run's settings.

    Raises:
        DataError: SugarCrepe is there but a set or its images are missing, or it is named and is not there.
        Gen2EmbedError: It is named, and so is a calibration or another score.
    """
    if name != DIVERSE:
        return None
    named = is_named(config)
    if config.subsets and not named:
        return None
    root = local_place(config.data_dir)
    folder = next((root / one for one in FOLDERS if (root / one).is_dir()), None)
    if folder is None:
        if named:
            raise DataError(f"{config.data_dir}: no {SUGARCREPE}; put its JSON files into a folder of this name")
        return None
    if named:
        refuse_comparison(config, SUGARCREPE_BENCHMARK.title)
    elif not config.is_plain:
        return None
    for one in SUGARCREPE_BENCHMARK.sets:
        set_file(folder, SUGARCREPE_BENCHMARK, one)
    given = [Path(config.image_dir).expanduser()] if config.image_dir else []
    places = [place / one for place in (*given, folder, root) for one in IMAGES]
    places = [*(one for one in given if one.name in IMAGES), *places]
    images = next((place for place in places if place.exists()), None)
    if images is None:
        raise DataError(
            f"{folder}: {SUGARCREPE_BENCHMARK.title} is there without its images; put COCO's {IMAGES[0]}, as a folder "
            f"or as {IMAGES[1]}, into it or beside it, or name the datasets to run with --subsets"
        )
    return replace(
        config,
        data_dir=str(folder),
        image_dir=str(images),
        embedding_dir=str(config.vectors_folder / SUGARCREPE),
        subsets=(),
        plain_captions=True,
    )


def is_named(config: EvaluationConfig) -> bool:
    """Return whether the settings name SugarCrepe among the datasets to run."""
    return any(matches(one, {SUGARCREPE: SUGARCREPE}) for one in config.subsets)


def why_left_out(name: str, config: EvaluationConfig) -> str:
    """Return a sentence for the report where SugarCrepe is there and is not run; else empty."""
    if name != DIVERSE or config.subsets or config.is_plain:
        return ""
    root = local_place(config.data_dir)
    if not any((root / one).is_dir() for one in FOLDERS):
        return ""
    return "SugarCrepe was left out: it compares by the cosine of the vectors as they are."
