"""Finds the sampling files for `gen2embed train`, compares them with one another, and opens the data they are of."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.readouts.readout import readout_of
from gen2embed_mteb.hub.addresses import in_hub_cache, is_address, local_place
from gen2embed_mteb.mmeb.datasets import matches
from gen2embed_mteb.storage.paths import user_cache
from trainers.data.config import DataConfig
from trainers.data.training_data import TrainingData, open_training_data
from trainers.sampling.files import Sampling, SamplingError, read_sampling

logger = logging.getLogger(__name__)


def read_samplings(path: str, subsets: Sequence[str] = (), num_hard_negatives: int | None = None) -> list[Sampling]:
    """Read sampling files.

    Args:
        path: A folder that `gen2embed sample` wrote, or one of its files, also by its address on the hub.
        subsets: The subsets that are wanted; empty: all.
        num_hard_negatives: The k that they must have; None: any.

    Returns:
        One sampling per subset, sorted by name.

    Raises:
        SamplingError: There is no file, a subset was not sampled, or k differs.
    """
    given = _local(path)
    if given.is_dir():
        found = (file for file in given.glob("*.parquet") if not file.name.startswith("."))  # macOS makes ._NAME twins
        files = sorted(file for file in found if file.with_suffix(".json").is_file())
    else:
        files = [given]
    if not files:
        raise SamplingError(f"{path}: no sampling files there; pass the --output_dir of gen2embed sample")
    known = {file.stem: file.stem for file in files}
    wanted: set[str] = set()
    for name in subsets:
        meant = matches(name, known)
        if not meant:
            raise SamplingError(f"{path}: subset {name!r} was not sampled, only {', '.join(known)}; see --subsets")
        if len(meant) > 1:
            raise SamplingError(
                f"{path}: subset {name!r} can mean {' or '.join(meant)}; write the one you mean exactly"
            )
        wanted.add(meant[0])
    samplings = [read_sampling(file) for file in files if not wanted or file.stem in wanted]
    for sampling in samplings:
        k = sampling.record["settings"]["num_hard_negatives"]
        if num_hard_negatives not in (None, k):
            raise SamplingError(
                f"{sampling.path}: sampled with k = {k}, not --num_hard_negatives {num_hard_negatives}; leave the flag "
                "out, or sample again"
            )
    return samplings


def _local(path: str) -> Path:
    """Return where the files are on this machine; of one file by address, its other half is fetched, too."""
    if is_address(path) and path.endswith((".parquet", ".json")):
        stem = path.rpartition(".")[0]
        return [local_place(stem + suffix) for suffix in (".json", ".parquet")][1]
    return local_place(path)


def open_sampled_data(
    samplings: Sequence[Sampling],
    data_dir: str = "",
    image_dir: str = "",
    *,
    follow_links: bool = False,
    exif_orientation: bool = False,
    remote_images: Sequence[str] = (),
) -> TrainingData:
    """Open the training data that was sampled.

    Args:
        samplings: Sampling files of one run.
        data_dir: The data, if it is not where the files say.
        image_dir: Its images, if they are not where the files say.
        follow_links: Whether links in the image folder may lead out of it.
        exif_orientation: Whether images are turned as their EXIF data says.
        remote_images: Which images may be read from other machines.

    Raises:
        DataError: The data is not there.
        FileNotFoundError: The images are not found.
        SamplingError: The files are of different data.
    """
    first = samplings[0].record["data"]
    keys = ("data_dir", "image_dir", "split", "columns", "image_columns", "limit", "row_limits", "pairs_only")
    settings = {key: first.get(key) for key in keys}
    for sampling in samplings:
        for key, value in settings.items():
            own = sampling.record["data"].get(key)
            if own != value:
                raise SamplingError(
                    f"{sampling.path}: sampled with {key} {own!r}, {samplings[0].path} with {value!r}; train on files "
                    "of one run"
                )
    records = [sampling.record for sampling in samplings]
    config = DataConfig.of_records(
        records,
        data_dir,
        image_dir,
        follow_links=follow_links,
        exif_orientation=exif_orientation,
        remote_images=remote_images,
    )
    place = samplings[0].path.parent
    return open_training_data(config, (user_cache() if in_hub_cache(place) else place) / "images-cache")


def warn_of_other_model(samplings: Sequence[Sampling], model: Gen2Embed, model_name: str) -> None:
    """Warn if the negatives were chosen with another model than the one to be trained (paper, Sec. III-C).

    Args:
        samplings: Sampling files.
        model: The model to be trained.
        model_name: The name or path that it was loaded by.
    """
    own = (model_name, model.prompt_mode, readout_of(model[0].model).name)
    for sampling in samplings:
        sampled = sampling.record["model"]
        by = (sampled["name"], sampled["prompt_mode"], sampled.get("readout", own[2]))  # earlier records name none
        if sampled["fingerprint"] and by != own:
            logger.warning(
                "%s: sampled by %s with prompt %s and readout %s, to train %s with prompt %s and readout %s; gen2embed "
                "sample with the model to be trained",
                sampling.path,
                *by,
                *own,
            )
            return


def data_name(samplings: Sequence[Sampling]) -> str:
    """Return the name of the training data in the model card.

    Args:
        samplings: Sampling files.
    """
    data = samplings[0].record["data"]
    names = [sampling.record["subset"] for sampling in samplings]
    what = names[0] if len(names) == 1 else f"{len(names)} subsets"
    return f"{Path(data['data_dir']).name} ({data['split']}, {what})"
