"""Tables of training pairs that `datasets` loads: of a Hub id, or of a folder of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gen2embed_mteb.hub.addresses import split_revision
from gen2embed_mteb.mmeb.tables import DataError, SubsetTable
from trainers.data.pairs import Table


def hub_names(hub_id: str) -> list[str]:
    """Return the names of a Hub id's configurations.

    Args:
        hub_id: The Hub id, with or without the revision that pins it.

    Raises:
        DataError: It cannot be looked up.
    """
    import datasets

    try:
        name, revision = split_revision(hub_id)
        return list(datasets.get_dataset_config_names(name, revision=revision))
    except Exception as error:  # the Hub's client raises a dozen kinds, most without a common base
        raise DataError(f"{hub_id}: cannot be looked up ({error}); pass a local folder, or check the name") from error


def hub_tables(data_dir: str, names: Sequence[str], split: str) -> dict[str, Table]:
    """Load tables of a Hub id.

    Args:
        data_dir: The Hub id, with or without the revision that pins it.
        names: The configurations.
        split: The split.

    Returns:
        The tables by configuration.

    Raises:
        DataError: One cannot be loaded, or has no rows.
    """
    import datasets

    tables: dict[str, Table] = {}
    hub_id, revision = split_revision(data_dir)
    for name in names:
        try:
            loaded = datasets.load_dataset(hub_id, name, split=split, revision=revision)
        except (ValueError, OSError) as error:
            raise DataError(f"{data_dir}: cannot load {name}, split {split!r} ({error}); see --split") from error
        tables[name] = loaded_table(loaded, f"{data_dir}/{name}")
    return tables


def loaded_table(dataset: Any, source: str) -> SubsetTable:
    """Return a table of `datasets` whose images are not decoded yet.

    Args:
        dataset: A `datasets.Dataset`.
        source: The folder or Hub id, for messages.

    Raises:
        DataError: It has no rows.
    """
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            # Images are opened later and by `ImageSource`, which limits what is decoded.
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    if not len(dataset):
        raise DataError(f"{source}: the table has no rows; check --data_dir and --split")
    return SubsetTable(source, tuple(dataset.column_names), len(dataset), loaded=dataset)
