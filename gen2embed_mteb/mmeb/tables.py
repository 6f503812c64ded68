"""Finding a benchmark's tables: a local folder in any of the usual layouts, or a dataset on the Hub.

Local layouts, for a subset S and a split P (`test`; `original` or `diverse_instruction`):

    DIR/S/P-00000-of-00001.parquet      a clone of TIGER-Lab/MMEB-eval or TIGER-Lab/MMEB-train
    DIR/S/P.parquet, DIR/S/P/*.parquet  the same written by hand, or the Hub's converted branch
    DIR/data/S/…                        any of them below a folder `data`
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb.datasets import DatasetInfo

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class DataError(Gen2EmbedError):
    """Benchmark data that cannot be used at all; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class SubsetTable:
    """The table of one subset, opened but not read.

    Attributes:
        source: The file or Hub id, for messages.
        columns: The names of its columns.
        num_rows: The number of its rows.
        files: Its parquet files in order; empty for the Hub.
        loaded: The `datasets.Dataset` of a table from the Hub.
    """

    source: str
    columns: tuple[str, ...]
    num_rows: int
    files: tuple[Path, ...] = ()
    loaded: Any = field(default=None, repr=False)

    def require(self, columns: Sequence[str]) -> None:
        """Checks that columns are there.

        Args:
            columns: The columns needed.

        Raises:
            DataError: Some are missing; names the file, them, the columns present and the remedy.
        """
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise DataError(
                f"{self.source}: no column {', '.join(missing)}; it has {', '.join(self.columns)}. Pass data in MMEB's "
                "form (https://huggingface.co/datasets/TIGER-Lab/MMEB-eval), or rename the columns"
            )

    def rows(self, columns: Sequence[str], limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Reads rows in order, a few at a time (a row of MMEB holds up to 1,000 candidates).

        Args:
            columns: The columns wanted.
            limit: Stop after this many rows.

        Yields:
            One dict a row.

        Raises:
            DataError: A column is missing, or a file is damaged.
        """
        self.require(columns)
        yield from islice(self._rows(list(columns)), limit)

    def _rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        if not self.files:
            for row in self.loaded.select_columns(columns):
                yield dict(row)
            return
        import pyarrow
        import pyarrow.parquet

        for path in self.files:
            try:
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{path}: damaged parquet file ({error}); download it again") from error


def open_subset(data_dir: str | Path, dataset: DatasetInfo, split: str, revision: str | None = None) -> SubsetTable:
    """Opens the table of one dataset.

    Args:
        data_dir: A local folder, or a Hub id such as `TIGER-Lab/MMEB-eval`.
        dataset: The dataset; both its evaluation and its training name are tried.
        split: The split's name.
        revision: The state of the Hub's data set; None: the newest.

    Returns:
        The table; nothing but its schema has been read from local files.

    Raises:
        DataError: The folder, the subset or the split is missing, or a file is damaged.
    """
    root = Path(data_dir).expanduser()
    if root.is_dir():
        files = local_files(root, dataset, split)
        if not files:
            expected = root / dataset.name / f"{split}-00000-of-00001.parquet"
            raise DataError(
                f"{root}: no parquet file of {dataset.name}, split {split!r}; expected {expected}. "
                "Download it, or leave it out with --subsets"
            )
        return _open_files(files)
    if not _HUB_ID.fullmatch(str(data_dir)):
        raise DataError(f"{data_dir}: no such folder; pass an existing --data_dir, or a Hub id such as OWNER/NAME")
    return _open_hub(str(data_dir), dataset, split, revision)


def open_subsets(
    data_dir: str | Path, datasets: Sequence[DatasetInfo], split: str
) -> list[tuple[DatasetInfo, SubsetTable]]:
    """Opens the tables of several datasets, and says at once which ones are missing.

    Args:
        data_dir: As for `open_subset`.
        datasets: The datasets.
        split: The split's name.

    Returns:
        The datasets with their tables, in order.

    Raises:
        DataError: One or more cannot be opened; the message lists those and the ones that can be.
    """
    opened: list[tuple[DatasetInfo, SubsetTable]] = []
    failures: list[tuple[str, DataError]] = []
    for dataset in datasets:
        try:
            opened.append((dataset, open_subset(data_dir, dataset, split)))
        except DataError as error:
            failures.append((dataset.name, error))
    if len(failures) == 1 or (failures and not opened):
        raise failures[0][1]
    if failures:
        raise DataError(
            f"{failures[0][1]} (missing as well: {', '.join(name for name, _ in failures[1:])}; "
            f"usable: --subsets {' '.join(dataset.name for dataset, _ in opened)})"
        )
    return opened


def local_files(root: Path, dataset: DatasetInfo, split: str) -> tuple[Path, ...]:
    """Finds the parquet files of one split, in order.

    Args:
        root: The data folder.
        dataset: The dataset.
        split: The split's name. Files of other splits beside it (MMEB-train keeps an old `train-…`) are left alone.

    Returns:
        The files; empty if there are none.
    """
    for parent in (root, root / "data"):
        for folder in dataset.folders:
            for pattern in (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet"):
                files = tuple(sorted((parent / folder).glob(pattern)))
                if files:
                    return files
    return ()


def _open_files(files: tuple[Path, ...]) -> SubsetTable:
    import pyarrow
    import pyarrow.parquet

    columns: tuple[str, ...] = ()
    num_rows = 0
    for path in files:
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); download it again") from error
        names = tuple(file.schema_arrow.names)
        # Of several files only what all of them have counts.
        columns = tuple(name for name in columns if name in names) if path != files[0] else names
        num_rows += file.metadata.num_rows
    return SubsetTable(str(files[0]), columns, num_rows, files)


def _open_hub(hub_id: str, dataset: DatasetInfo, split: str, revision: str | None) -> SubsetTable:
    import datasets

    failure: Exception | None = None
    for folder in dataset.folders:
        try:
            loaded = datasets.load_dataset(hub_id, folder, split=split, revision=revision)
        except ValueError as error:  # no such configuration or split: try the other spelling
            failure = error
            continue
        except OSError as error:  # not found, no network
            raise DataError(f"{hub_id}: cannot be loaded ({error}); pass a local folder as --data_dir") from error
        return SubsetTable(f"{hub_id}/{folder}", tuple(loaded.column_names), len(loaded), loaded=loaded)
    raise DataError(f"{hub_id}: no subset {dataset.name} with split {split!r} ({failure}); see --subsets, --eval_split")
