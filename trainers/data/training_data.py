"""Opens training pairs in MMEB-train's form or in any table of two columns; they are read row by row.

`data_dir` may be:

    a folder or Hub id in MMEB-train's form      a subset is a folder with the split's Parquet files (`mmeb/tables.py`)
    `mmeb-mini`                                  the embedded benchmark's training sets, drawn on first use
    `docstrings`                                 two subsets of texts that are installed with us (`docstrings.py`)
    a .parquet or .jsonl file, a folder of them  a subset is a file, or the shards `NAME-00000-of-00004` of one
    a folder of `datasets.save_to_disk`          one subset
    any other Hub id                             a subset is a configuration

An address of the Hub, `hf://datasets/OWNER/NAME@REVISION/FOLDER`, is downloaded and read as a local folder; a Hub id
may be pinned as `OWNER/NAME@REVISION`.

All but the first three hold a query and its positive in two columns, as sentence-transformers has it; a list is several
positives, and explicit negatives are in columns `negative`, `negative_1`, … A cell is a text,
an image as `datasets` stores it (`{"bytes", "path"}`), both (`{"text", "image"}`), or, in the columns that
`image_columns` names, the path of an image. Text that looks like a path stays text.

Images that are embedded in a table are written to a cache folder (`cached_images.py`). Images that the data names by
path stay where they are.

Opening reads no rows, except that a table of two columns is read up to its first usable row. Every call of a subset's
`rows` is one pass over its table.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gen2embed_mteb.data_files.json_lines import JsonLines
from gen2embed_mteb.data_files.rows import RowLimits, guarded
from gen2embed_mteb.data_files.shards import (
    by_table,
    canonical_split,
    is_utf8,
    of_split,
    require_regular,
    split_files,
    split_of,
    table_name,
    whole_table,
)
from gen2embed_mteb.errors import one_line
from gen2embed_mteb.evaluation.run import ROWS_SEARCHED, find_images
from gen2embed_mteb.hub.addresses import HUB_ID, is_address, local_place
from gen2embed_mteb.images.cached_images import EMBEDDED, CachedImages
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mini.places import TRAIN_TABLES
from gen2embed_mteb.mmeb import MMEB, Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.datasets import lookup
from gen2embed_mteb.mmeb.readers import NEGATIVE_COLUMNS, TRAIN_COLUMNS, BadRow, TrainRow, read_train_rows
from gen2embed_mteb.mmeb.tables import DataError, SubsetTable, open_files, open_subsets
from trainers.data import docstrings
from trainers.data.config import DataConfig
from trainers.data.hub_tables import hub_names, hub_tables, loaded_table
from trainers.data.pairs import PairSubset, Table

__all__ = [
    "EMBEDDED",
    "CachedImages",
    "DataConfig",
    "JsonLines",
    "MmebSubset",
    "PairSubset",
    "TrainingData",
    "TrainingSubset",
    "open_training_data",
]

logger = logging.getLogger(__name__)

MINI = "mmeb-mini"
SPLITS = ("original", "diverse_instruction")


class TrainingSubset(Protocol):
    """An opened set of training pairs that are sampled together; it can be read several times."""

    @property
    def name(self) -> str:
        """The subset's name, in reports and in the names of its files."""

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Read the pairs in order."""

    def has_images(self) -> bool:
        """Read the first rows, and return whether one of them has an image."""


@dataclass(frozen=True)
class MmebSubset:
    """A subset in MMEB-train's form.

    Attributes:
        name: The subset's name in the training data (`ImageNet_1K`).
        table: The subset's table.
        limit: The number of rows to read; None: all.
        limits: How large a row may be.
    """

    name: str
    table: SubsetTable
    limit: int | None = None
    limits: RowLimits = field(default_factory=RowLimits)

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""
        return self.table.source

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Read the pairs in order.

        Raises:
            DataError: The file is damaged.
        """
        return read_train_rows(self.table, self.limit, self.limits)

    def has_images(self) -> bool:
        """Read the first rows, and return whether one of them has an image.

        Raises:
            DataError: The file is damaged.
        """
        rows = read_train_rows(self.table, min(self.limit or ROWS_SEARCHED, ROWS_SEARCHED), self.limits)
        return any(row.query.images or row.positive.images for row in rows if not isinstance(row, BadRow))

    def columns(self) -> Iterator[dict[str, Any]]:
        """Read the rows as dicts of MMEB-train's columns; in a row that cannot be read, all values are None.

        Raises:
            DataError: The file is damaged.
        """
        columns = (*TRAIN_COLUMNS, *(column for column in NEGATIVE_COLUMNS if column in self.table.columns))
        rows = self.table.rows(columns, self.limit, self.limits)
        for row in guarded(rows, self.table.file_of, lambda _, row: dict(row)):
            yield dict.fromkeys(columns) if isinstance(row, BadRow) else row


@dataclass(frozen=True)
class TrainingData:
    """Opened training data.

    Attributes:
        subsets: The subsets, in order.
        images: Opens the images of all subsets.
        split: The split that was opened.
    """

    subsets: tuple[TrainingSubset, ...]
    images: CachedImages
    split: str


def open_training_data(config: DataConfig, cache: Path) -> TrainingData:
    """Open every subset and check its columns; see this module's docstring for what is read.

    Args:
        config: Which data to open.
        cache: The folder for images that the tables embed; made if it is needed.

    Returns:
        The data.

    Raises:
        DataError: A folder, subset, split or column is missing, or a file is damaged.
        FileNotFoundError: The images are not found.
        ValueError: A subset is unknown.
    """
    if config.data_dir == MINI:
        from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure

        root = ensure("train") / TRAIN_TABLES
        return _open_mmeb(config, root, cache, _training_sets(MMEB_MINI, config.subsets, ()))
    if config.data_dir == docstrings.NAME:
        return _open_docstrings(config, cache)
    path = local_place(config.data_dir)
    if path.is_dir():
        found = _mmeb_folders(path, config.split or SPLITS[0])
        if found:
            return _open_mmeb(config, path, cache, _training_sets(_benchmark_of(found), config.subsets, found))
    if not path.exists() and not HUB_ID.fullmatch(config.data_dir):
        raise DataError(f"{config.data_dir}: no such folder or file; pass an existing --data_dir, or OWNER/NAME")
    if path.exists():
        files, split = _local_tables(path, config.split)
        chosen = _chosen(config.subsets, list(files))
        tables = {name: _open_table(name, files[name], whole=not path.is_file()) for name in chosen}
        return _open_pairs(config, tables, path, cache, split)
    names = hub_names(config.data_dir)
    if {folder for dataset in MMEB.datasets for folder in dataset.folders} & set(names):
        return _open_mmeb(config, config.data_dir, cache, _training_sets(MMEB, config.subsets, ()))
    split = config.split or "train"
    return _open_pairs(config, hub_tables(config.data_dir, _chosen(config.subsets, names), split), path, cache, split)


def _open_docstrings(config: DataConfig, cache: Path) -> TrainingData:
    if config.split not in ("", "train"):
        raise DataError(f"{docstrings.NAME} has no split {config.split!r}; leave --split out")
    tables = docstrings.tables()
    chosen = {name: tables[name] for name in _chosen(config.subsets, list(tables))}
    return _open_pairs(config, chosen, Path(docstrings.NAME), cache, "train")


def _training_sets(benchmark: Benchmark, subsets: Sequence[str], found: Sequence[str]) -> list[DatasetInfo]:
    """Return the subsets that were asked for, or all: the benchmark's training sets, then other folders of its form."""
    with_training = [dataset for dataset in benchmark.datasets if dataset.in_domain]
    names = {folder for dataset in with_training for folder in dataset.folders}
    # Only the name and the folder of such a record are used.
    own = [DatasetInfo(name, "Retrieval", True, "label") for name in found if name not in names]
    known = with_training + own if names & set(found) or not own else own
    if not subsets:
        return known
    by_name = {dataset.name: dataset for dataset in known}
    aliases = {folder: dataset.name for dataset in known for folder in dataset.folders}
    chosen = {lookup(name, aliases, "subset", by_name) for name in subsets}
    return [dataset for dataset in known if dataset.name in chosen]


def _benchmark_of(found: Sequence[str]) -> Benchmark:
    from gen2embed_mteb.mini.benchmark import MMEB_MINI

    return MMEB_MINI if set(found) & set(MMEB_MINI.names) else MMEB


def _mmeb_folders(root: Path, split: str) -> list[str]:
    """Return the names of the folders that have files of the split in MMEB-train's form, sorted."""
    inside = [path for parent in (root, root / "data") if parent.is_dir() for path in parent.iterdir()]
    names = {path.name for path in inside if path != root / "data" and is_utf8(path.name) and split_files(path, split)}
    return sorted(names)


def _open_mmeb(config: DataConfig, data_dir: str | Path, cache: Path, chosen: list[DatasetInfo]) -> TrainingData:
    split = config.split or SPLITS[0]
    tables = open_subsets(data_dir, chosen, split)
    for _, table in tables:
        table.require(TRAIN_COLUMNS)
    images = _images(config, find_images(str(data_dir), config.image_dir, follow_links=config.follow_links), cache)
    subsets = [MmebSubset(dataset.folders[-1], table, config.limit, config) for dataset, table in tables]
    elsewhere = config.image_dir or config.remote_images
    if is_address(config.data_dir) and not elsewhere and any(subset.has_images() for subset in subsets):
        raise DataError(
            f"{config.data_dir}: of an address the tables alone are downloaded, and they name images; pass "
            "--image_dir, a folder, an archive, or an address of one"
        )
    return TrainingData(tuple(subsets), images, split)


def _open_pairs(config: DataConfig, tables: Mapping[str, Table], path: Path, cache: Path, split: str) -> TrainingData:
    root = path.parent if path.is_file() else path
    named = config.image_dir or root.is_dir()
    found = find_images(str(root), config.image_dir, follow_links=config.follow_links) if named else None
    images = _images(config, found, cache)
    how: dict[str, Any] = {"image_columns": config.image_columns, "limit": config.limit, "limits": config}
    how["several"] = not config.pairs_only
    subsets = [
        PairSubset(
            name, table, _two_columns(table, config), images, negatives=config.negative_columns(table.columns), **how
        )
        for name, table in tables.items()
    ]
    for subset in subsets:
        if not set(config.image_columns) <= set(subset.columns):
            raise DataError(f"{subset.source}: image_columns {config.image_columns} are not among {subset.columns}")
        subset.require_usable()
    return TrainingData(tuple(subsets), images, split)


def _images(config: DataConfig, found: ImageSource | None, cache: Path) -> CachedImages:
    return CachedImages(
        None if found is None else found.path,
        cache,
        follow_links=found is not None and found.follow_links,
        exif_orientation=config.exif_orientation,
        remote_images=config.remote_images,
    )


def _two_columns(table: Table, config: DataConfig) -> tuple[str, str]:
    found = config.two_columns(table.columns)
    if found is not None:
        return found
    names = f"columns {' and '.join(config.columns)}" if config.columns else f"columns {config.known_columns}"
    raise DataError(f"{table.source}: no {names}; it has {', '.join(table.columns) or 'none'}. {config.name_columns}")


def _local_tables(path: Path, split: str) -> tuple[dict[str, list[Path]], str]:
    """Return the files of each table of a local file or folder, by subset name, and the split that they are of.

    Raises:
        DataError: There are no tables, or none of that split, or it is not clear which files belong to it.
    """
    if (path / "dataset_dict.json").is_file():
        path, split = path / (split or "train"), split or "train"
        if not path.is_dir():
            raise DataError(f"{path}: no such split; pass another --split")
        return {path.resolve().name: [path]}, split
    if (path / "dataset_info.json").is_file():
        return {path.resolve().name: [path]}, _saved_split(path, split)
    if path.is_file():
        own = split_of(path)
        if split and own and canonical_split(split) != own:
            raise DataError(f"{path}: its name says split {own!r}, not {split!r}; leave --split out to use it so")
        if table_name(path) != path.stem:
            logger.warning("%s is one shard of several; pass its folder as --data_dir to use all", path)
        return {table_name(path): [path]}, split or own or "train"
    if not path.is_dir():
        require_regular(path)  # refuses a named pipe or a device
    folders = [folder for folder in (path, path / "data") if folder.is_dir()]
    found = [[file for file in sorted(folder.iterdir()) if _is_table(file)] for folder in folders]
    files = next((files for files in found if files), [])
    if not files:
        raise DataError(
            f"{path}: neither MMEB-train's form (SUBSET/original-00000-of-00001.parquet) nor .parquet or .jsonl files "
            "nor a folder of datasets.save_to_disk; check --data_dir and --split"
        )
    tables = by_table(of_split(files, split or "train"))
    for name in tables:
        if not is_utf8(name):
            raise DataError(f"{path}: the name of {name!r} is not UTF-8; rename the file")
    return tables, split or "train"


def _is_table(file: Path) -> bool:
    return file.suffix in (".parquet", ".jsonl") and not file.name.startswith(".") and not file.is_dir()


def _saved_split(path: Path, split: str) -> str:
    """Return the split of a folder of `save_to_disk`, whose state file names it."""
    try:
        saved = str(json.loads(require_regular(path / "state.json").read_bytes())["_split"] or "")
    except (ValueError, KeyError, TypeError, RecursionError):
        saved = ""
    own = re.split(r"[\[+]", saved)[0]
    if split and own and canonical_split(split) != canonical_split(own):
        raise DataError(f"{path}: holds split {own!r}, not {split!r}; leave --split out to use it")
    return split or own or "train"


def _open_table(name: str, files: Sequence[Path], *, whole: bool) -> Table:
    """Open a table; with `whole`, all its shards must be there."""
    import datasets

    if files[0].is_dir():
        for file in files[0].iterdir():
            require_regular(file)
        try:
            loaded = datasets.load_from_disk(str(files[0]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # no shards at all raise an IndexError
            what = f"no rows, or no folder of datasets.save_to_disk ({type(error).__name__}: {one_line(error)})"
            raise DataError(f"{files[0]}: the table has {what}; save it again") from error
        return loaded_table(loaded, str(files[0]))
    ordered = whole_table(files) if whole else tuple(files)
    if ordered[0].suffix == ".parquet":
        return open_files(ordered)
    if len(ordered) > 1:
        raise DataError(f"{ordered[0]}: {name} lies here as several files; join them into one")
    table = JsonLines(ordered[0])
    table.require_rows()
    return table


def _chosen(subsets: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that were asked for, or all names, in the order of `names`."""
    chosen = {lookup(name, {known: known for known in names}, "subset", names) for name in subsets}
    return [name for name in names if not subsets or name in chosen]
