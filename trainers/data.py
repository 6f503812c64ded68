"""Training pairs, from MMEB-train's form or from any table of two columns, read row by row.

What `data_dir` may be:

    a folder or Hub id in MMEB-train's form      a subset is a folder with the split's Parquet files (`mmeb/tables.py`)
    `mmeb-mini`                                  the embedded benchmark's training sets, drawn on first use
    a .parquet or .jsonl file, a folder of them  a subset is a file, or the shards `NAME-00000-of-00004` of one
    a folder of `datasets.save_to_disk`          one subset
    any other Hub id                             a subset is a configuration

All but the first two hold a query and its positive in two columns, as sentence-transformers has it. A cell is a text,
an image as `datasets` stores it (`{"bytes", "path"}`), both (`{"text", "image"}`), or, in the columns that
`image_columns` names, the path of an image. Text that looks like a path stays text.

Images that are embedded in a table are written once each, under their SHA-256, into a cache folder, since the threads
that open images work from paths. Images that the data names by path stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gen2embed_mteb.encoder import Item
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation import find_images, setting
from gen2embed_mteb.image_source import ImageSource
from gen2embed_mteb.images import ImageFacts
from gen2embed_mteb.mmeb import MMEB, Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.datasets import lookup
from gen2embed_mteb.mmeb.readers import NEGATIVE_COLUMNS, TRAIN_COLUMNS, BadRow, TrainRow, read_train_rows
from gen2embed_mteb.mmeb.tables import DataError, SubsetTable, local_files, open_subsets
from gen2embed_mteb.store import write_atomic

MINI = "mmeb-mini"
SPLITS = ("original", "diverse_instruction")
PAIR_COLUMNS = (("anchor", "positive"), ("query", "positive"))
EMBEDDED = "embedded:"
"""What the path of an image begins with that was embedded in a table; the rest is its SHA-256."""

_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which training pairs to read."""

    data_dir: str = setting("folder, file or Hub id of the training pairs, or mmeb-mini")
    split: str = setting("split; empty: `original` in MMEB-train's form, `train` elsewhere", default="")
    subsets: tuple[str, ...] = setting("subsets to read; empty: all", default=())
    image_dir: str = setting("folder or .zip archive that image paths are relative to; empty: beside it", default="")
    columns: tuple[str, ...] = setting("names of the two columns; empty: anchor or query, and positive", default=())
    image_columns: tuple[str, ...] = setting("those of the two whose strings are paths of images", default=())
    limit: int | None = setting("rows a subset, from the first; None: all", default=None)

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        if not self.data_dir:
            raise Gen2EmbedError("data_dir is empty; pass a folder, a file, a Hub id, or mmeb-mini")
        if self.limit is not None and self.limit < 1:
            raise Gen2EmbedError(f"limit is {self.limit}; pass 1 or more")
        if len(self.columns) not in (0, 2) or len(set(self.columns)) != len(self.columns):
            raise Gen2EmbedError(f"columns is {self.columns}; pass two names, the query's and its positive's")


class TrainingSubset(Protocol):
    """Training pairs that are sampled together: opened, and read as often as needed."""

    @property
    def name(self) -> str:
        """The name of its files and in reports."""

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Reads the pairs in order."""


class Table(Protocol):
    """What reading pairs needs of a table; `SubsetTable` and `JsonLines` are ones."""

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of its columns."""

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Reads rows in order."""


@dataclass(frozen=True)
class MmebSubset:
    """A subset in MMEB-train's form.

    Attributes:
        name: Its name in the training data (`ImageNet_1K`).
        table: Its table.
        limit: Read this many rows.
    """

    name: str
    table: SubsetTable
    limit: int | None = None

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""
        return self.table.source

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Reads the pairs in order.

        Raises:
            DataError: The file is damaged.
        """
        return read_train_rows(self.table, self.limit)

    def columns(self) -> Iterator[dict[str, Any]]:
        """Reads the rows as they are, MMEB-train's columns by name.

        Raises:
            DataError: The file is damaged.
        """
        negative = [column for column in NEGATIVE_COLUMNS if column in self.table.columns]
        return self.table.rows((*TRAIN_COLUMNS, *negative), self.limit)


class CachedImages(ImageSource):
    """Images by path, and those that were embedded in a table.

    Args:
        root: Folder or archive of the images with a path; None where there are none.
        cache: Folder of the embedded ones; made when the first is kept.
    """

    def __init__(self, root: Path | None, cache: Path) -> None:
        """Checks the root."""
        if root is None:
            cache.mkdir(parents=True, exist_ok=True)
        super().__init__(root if root is not None else cache)
        self._cache = cache

    def keep(self, data: bytes) -> str:
        """Keeps an encoded image.

        Args:
            data: The bytes of an image file.

        Returns:
            The path under which `open` finds it.
        """
        digest = hashlib.sha256(data).hexdigest()
        target = self._cache / digest[:2] / digest
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, data)
        return EMBEDDED + digest

    def open(self, path: str) -> Image.Image:
        """Opens one image as RGB; see `ImageSource.open`."""
        inside = self._embedded(path)
        return ImageSource(self._cache).open(inside) if inside else super().open(path)

    def facts(self, path: str) -> ImageFacts:
        """Digest and size; see `ImageSource.facts`."""
        inside = self._embedded(path)
        return ImageSource(self._cache).facts(inside) if inside else super().facts(path)

    @staticmethod
    def _embedded(path: str) -> str:
        digest = path.removeprefix(EMBEDDED)
        return f"{digest[:2]}/{digest}" if digest != path and re.fullmatch("[0-9a-f]{64}", digest) else ""


@dataclass(frozen=True)
class PairSubset:
    """A subset in two columns.

    Attributes:
        name: Its name.
        table: Its table.
        columns: The query's column and its positive's.
        images: Where images are kept that the table embeds.
        image_columns: The columns whose strings are paths of images.
        limit: Read this many rows.
    """

    name: str
    table: Table
    columns: tuple[str, str]
    images: CachedImages
    image_columns: tuple[str, ...] = ()
    limit: int | None = None

    @property
    def source(self) -> str:
        """The file or Hub id, for messages."""
        return self.table.source

    def rows(self) -> Iterator[TrainRow | BadRow]:
        """Reads the pairs in order; embedded images are kept on the way.

        Raises:
            DataError: The file is damaged.
        """
        for index, row in enumerate(self.table.rows(self.columns, self.limit)):
            try:
                query, positive = (self._item(row[column], column) for column in self.columns)
            except ValueError as error:
                yield BadRow(index, self.source, str(error))
                continue
            yield TrainRow(index, query, positive, None)

    def _item(self, cell: Any, column: str) -> Item:
        if isinstance(cell, str) and column not in self.image_columns:
            item = Item(cell)
        elif isinstance(cell, dict) and cell.keys() & {"text", "image"}:
            text, image = cell.get("text") or "", cell.get("image")
            if not isinstance(text, str):
                raise Gen2EmbedError(f"{column}: its text is {type(text).__name__}, not a string")
            item = Item(text, (self._path(image, column),) if image else ())
        else:
            item = Item("", (self._path(cell, column),))
        if not item.text and not item.images:
            raise Gen2EmbedError(f"{column} has neither text nor image")
        return item

    def _path(self, image: Any, column: str) -> str:
        if isinstance(image, str) and image:
            return image
        if isinstance(image, dict) and image.keys() & {"bytes", "path"}:
            if image.get("bytes"):
                return self.images.keep(image["bytes"])
            if image.get("path"):
                return str(image["path"])
        what = "null" if image is None else type(image).__name__
        raise Gen2EmbedError(f'{column} is {what}, not a text, a path in image_columns, or {{"bytes", "path"}}')


@dataclass(frozen=True)
class JsonLines:
    """A table with one JSON object a line.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def source(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that the first line has."""
        return tuple(next(self._lines(), {}))

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Reads rows in order.

        Args:
            columns: The names wanted; None stands where a line lacks one.
            limit: Stop after this many rows.

        Yields:
            One dict a line.

        Raises:
            DataError: A line is no JSON object.
        """
        for line in islice(self._lines(), limit):
            yield {column: line.get(column) for column in columns}

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{self.path}, line {number}: no JSON ({error}); write the file again") from error
                if not isinstance(value, dict):
                    raise DataError(f"{self.path}, line {number}: not an object; one row a line is expected")
                yield value


@dataclass(frozen=True)
class TrainingData:
    """Opened training data.

    Attributes:
        subsets: The subsets, in order.
        images: Opens the images of all of them.
        split: The split that was opened.
    """

    subsets: tuple[TrainingSubset, ...]
    images: CachedImages
    split: str


def open_training_data(config: DataConfig, cache: Path) -> TrainingData:
    """Opens every subset and checks its columns; reads no rows.

    Args:
        config: Which data.
        cache: Folder for images that the tables embed; made if it is needed.

    Returns:
        The data.

    Raises:
        DataError: A folder, subset, split or column is missing, or a file is damaged.
        FileNotFoundError: The images are nowhere.
        ValueError: A subset is unknown.
    """
    if config.data_dir == MINI:
        from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure

        root = ensure("train") / "MMEB-train"
        return _open_mmeb(config, root, cache, _training_sets(MMEB_MINI, config.subsets, ()))
    path = Path(config.data_dir).expanduser()
    if path.is_dir():
        found = _mmeb_folders(path, config.split or SPLITS[0])
        if found:
            return _open_mmeb(config, path, cache, _training_sets(_benchmark_of(found), config.subsets, found))
    if not path.exists() and not _HUB_ID.fullmatch(config.data_dir):
        raise DataError(f"{config.data_dir}: no such folder or file; pass an existing --data_dir, or OWNER/NAME")
    if path.exists():
        tables = _pair_tables(path, config.split or "train")
        return _open_pairs(config, {name: tables[name] for name in _chosen(config.subsets, list(tables))}, path, cache)
    names = _hub_names(config.data_dir)
    if {folder for dataset in MMEB.datasets for folder in dataset.folders} & set(names):
        return _open_mmeb(config, config.data_dir, cache, _training_sets(MMEB, config.subsets, ()))
    return _open_pairs(config, _hub_tables(config, names, config.split or "train"), path, cache)


def _training_sets(benchmark: Benchmark, subsets: Sequence[str], found: Sequence[str]) -> list[DatasetInfo]:
    """The subsets that were asked for, or all: the benchmark's training sets, then folders of its form beside them."""
    with_training = [dataset for dataset in benchmark.datasets if dataset.in_domain]
    names = {folder for dataset in with_training for folder in dataset.folders}
    # Only its name and its folder are used of such a record.
    own = [DatasetInfo(name, "Retrieval", True, "label") for name in found if name not in names]
    known = with_training + own if names & set(found) or not own else own
    if not subsets:
        return known
    by_name = {dataset.name: dataset for dataset in known}
    aliases = {folder.lower(): dataset.name for dataset in known for folder in dataset.folders}
    chosen = {lookup(name, aliases, "subset", by_name) for name in subsets}
    return [dataset for dataset in known if dataset.name in chosen]


def _benchmark_of(found: Sequence[str]) -> Benchmark:
    from gen2embed_mteb.mini.benchmark import MMEB_MINI

    return MMEB_MINI if set(found) & set(MMEB_MINI.names) else MMEB


def _mmeb_folders(root: Path, split: str) -> list[str]:
    """The folders with files of the split in MMEB-train's form, by name."""
    folders = {path.name for parent in (root, root / "data") if parent.is_dir() for path in parent.iterdir()}
    return [name for name in sorted(folders) if local_files(root, DatasetInfo(name, "Retrieval", True, "label"), split)]


def _hub_names(hub_id: str) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_config_names(hub_id))
    except Exception as error:  # the Hub's client raises a dozen kinds, most without a common base
        raise DataError(f"{hub_id}: cannot be looked up ({error}); pass a local folder, or check the name") from error


def _open_mmeb(config: DataConfig, data_dir: str | Path, cache: Path, chosen: list[DatasetInfo]) -> TrainingData:
    split = config.split or SPLITS[0]
    tables = open_subsets(data_dir, chosen, split)
    for _, table in tables:
        table.require(TRAIN_COLUMNS)
    images = CachedImages(find_images(str(data_dir), config.image_dir).path, cache)
    subsets = [MmebSubset(dataset.folders[-1], table, config.limit) for dataset, table in tables]
    return TrainingData(tuple(subsets), images, split)


def _open_pairs(config: DataConfig, tables: Mapping[str, Table], path: Path, cache: Path) -> TrainingData:
    root = path.parent if path.is_file() else path
    named = config.image_dir or root.is_dir()
    images = CachedImages(find_images(str(root), config.image_dir).path if named else None, cache)
    subsets = [
        PairSubset(name, table, _two_columns(table, config.columns), images, config.image_columns, config.limit)
        for name, table in tables.items()
    ]
    for subset in subsets:
        if not set(config.image_columns) <= set(subset.columns):
            raise DataError(f"{subset.source}: image_columns {config.image_columns} are not among {subset.columns}")
    return TrainingData(tuple(subsets), images, config.split or "train")


def _two_columns(table: Table, wanted: tuple[str, ...]) -> tuple[str, str]:
    for query, positive in (wanted,) if wanted else PAIR_COLUMNS:
        if query in table.columns and positive in table.columns:
            return query, positive
    names = f"columns {' and '.join(wanted)}" if wanted else "columns anchor (or query) and positive"
    raise DataError(
        f"{table.source}: no {names}; it has {', '.join(table.columns) or 'none'}. Name two of them with --columns"
    )


def _pair_tables(path: Path, split: str) -> dict[str, Table]:
    """The tables of a local file or folder by subset name, in order of name."""
    import pyarrow
    import pyarrow.parquet

    if (path / "dataset_dict.json").is_file():
        path = path / split
        if not path.is_dir():
            raise DataError(f"{path}: no such split; pass another --split")
    if (path / "dataset_info.json").is_file():
        import datasets

        return {path.name: _loaded(datasets.load_from_disk(str(path)), str(path))}
    files = [path] if path.is_file() else sorted(path.iterdir())
    groups: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix in (".parquet", ".jsonl"):
            shard = _SHARD.fullmatch(file.stem)
            groups.setdefault(shard[1] if shard else file.stem, []).append(file)
    if not groups:
        raise DataError(
            f"{path}: neither MMEB-train's form (SUBSET/original-00000-of-00001.parquet) nor .parquet or .jsonl files "
            "nor a folder of datasets.save_to_disk; check --data_dir and --split"
        )
    tables: dict[str, Table] = {}
    for name, group in groups.items():
        if group[0].suffix == ".jsonl":
            if len(group) > 1:
                raise DataError(f"{group[0]}: {name} lies here as several files; keep one of them")
            tables[name] = JsonLines(group[0])
            continue
        try:
            metadata = [pyarrow.parquet.ParquetFile(file) for file in group]
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{group[0]}: not a readable parquet file ({error}); write it again") from error
        columns = tuple(metadata[0].schema_arrow.names)
        tables[name] = SubsetTable(
            str(group[0]), columns, sum(one.metadata.num_rows for one in metadata), files=tuple(group)
        )
    return tables


def _hub_tables(config: DataConfig, names: Sequence[str], split: str) -> dict[str, Table]:
    import datasets

    tables: dict[str, Table] = {}
    for name in _chosen(config.subsets, names):
        try:
            loaded = datasets.load_dataset(config.data_dir, name, split=split)
        except (ValueError, OSError) as error:
            raise DataError(f"{config.data_dir}: cannot load {name}, split {split!r} ({error}); see --split") from error
        tables[name] = _loaded(loaded, f"{config.data_dir}/{name}")
    return tables


def _chosen(subsets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that were asked for, or all, in the order of all."""
    chosen = {lookup(name, {known.lower(): known for known in names}, "subset", names) for name in subsets}
    return [name for name in names if not subsets or name in chosen]


def _loaded(dataset: Any, source: str) -> SubsetTable:
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            # Images are opened later and by `ImageSource`, which limits what is decoded.
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return SubsetTable(source, tuple(dataset.column_names), len(dataset), loaded=dataset)
