"""Finding a benchmark's tables: a local folder in any of the usual layouts, or a dataset on the Hub.

Local layouts, for a subset S and a split P (`test`; `original` or `diverse_instruction`):

    DIR/S/P-00000-of-00001.parquet      a clone of TIGER-Lab/MMEB-eval or TIGER-Lab/MMEB-train
    DIR/S/P.parquet, DIR/S/P/*.parquet  the same written by hand, or the Hub's converted branch
    DIR/data/S/…                        any of them below a folder `data`

A folder of the Hub by its address (`hf://datasets/OWNER/NAME@REVISION`) is downloaded, and read as a local one.

A split must be complete and must be there only once; see `data_files/shards.py`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from gen2embed_mteb.data_files.rows import RowFault, RowLimits
from gen2embed_mteb.data_files.shards import DataError, split_files, whole_table
from gen2embed_mteb.hub.addresses import HUB_ID, local_place, split_revision
from gen2embed_mteb.mmeb.datasets import DatasetInfo

__all__ = ["DataError", "SubsetTable", "local_files", "open_files", "open_subset", "open_subsets"]


@dataclass(frozen=True)
class SubsetTable:
    """The table of one subset, whose rows are not read yet.

    Attributes:
        source: The file or Hub id, for messages.
        columns: The names of its columns.
        num_rows: The number of its rows.
        files: Its Parquet files in order; empty for a table from the Hub.
        ends: For each file, the number of rows in it and in all files before it.
        loaded: The `datasets.Dataset` of a table from the Hub.
    """

    source: str
    columns: tuple[str, ...]
    num_rows: int
    files: tuple[Path, ...] = ()
    ends: tuple[int, ...] = ()
    loaded: Any = field(default=None, repr=False)

    def require(self, columns: Sequence[str]) -> None:
        """Check that the table has certain columns.

        Args:
            columns: The columns.

        Raises:
            DataError: Columns are missing; the message names the file, these columns, those present and the remedy.
        """
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise DataError(
                f"{self.source}: no column {', '.join(missing)}; it has {', '.join(self.columns)}. Pass data in MMEB's "
                "form (https://huggingface.co/datasets/TIGER-Lab/MMEB-eval), or rename the columns"
            )

    def file_of(self, row: int) -> str:
        """Return the file that holds a row, or the Hub id.

        Args:
            row: The row's number in its split, from 0.
        """
        number = bisect_right(self.ends, row)
        return str(self.files[number]) if number < len(self.files) else self.source

    def rows(
        self, columns: Sequence[str], limit: int | None = None, limits: RowLimits | None = None
    ) -> Iterator[dict[str, Any] | RowFault]:
        """Read rows in order, a few at a time, since a row of MMEB holds up to 1,000 candidates.

        Args:
            columns: The columns to read.
            limit: Stop after this many rows.
            limits: The largest accepted size of a row; None stands for the defaults.

        Yields:
            One dict per row, or its fault.

        Raises:
            DataError: A column is missing, or a file is damaged.
        """
        self.require(columns)
        yield from islice(self._rows(list(columns), limits or RowLimits()), limit)

    def _rows(self, columns: list[str], limits: RowLimits) -> Iterator[dict[str, Any] | RowFault]:
        from gen2embed_mteb.data_files.parquet import ROWS_AT_ONCE, batch_rows, read_rows

        for path in self.files:
            yield from read_rows(path, columns, limits)
        if not self.files:
            for table in self.loaded.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE):
                yield from batch_rows(table.combine_chunks(), limits, self.source)


def open_subset(data_dir: str | Path, dataset: DatasetInfo, split: str, revision: str | None = None) -> SubsetTable:
    """Open the table of one dataset.

    Args:
        data_dir: A local folder, an address of the Hub, or a Hub id such as `TIGER-Lab/MMEB-eval`; see `hub/addresses`.
        dataset: The dataset; both its evaluation and its training name are tried.
        split: The split's name.
        revision: The revision of a Hub id that names none; None for the newest.

    Returns:
        The table; only metadata has been read from local files.

    Raises:
        DataError: The folder, the subset or the split is missing, or a file is damaged.
    """
    root = local_place(data_dir)
    if root.is_dir():
        files = local_files(root, dataset, split)
        if not files:
            expected = root / dataset.name / f"{split}-00000-of-00001.parquet"
            raise DataError(
                f"{root}: no parquet file of {dataset.name}, split {split!r}; expected {expected}. "
                "Download it, or leave it out with --subsets"
            )
        return open_files(files)
    if not HUB_ID.fullmatch(str(data_dir)):
        raise DataError(f"{data_dir}: no such folder; pass an existing --data_dir, or a Hub id such as OWNER/NAME")
    hub_id, pinned = split_revision(str(data_dir))
    return _open_hub(hub_id, dataset, split, pinned or revision)


def open_subsets(
    data_dir: str | Path, datasets: Sequence[DatasetInfo], split: str
) -> list[tuple[DatasetInfo, SubsetTable]]:
    """Open the tables of several datasets, and report all missing ones at once.

    Args:
        data_dir: As for `open_subset`.
        datasets: The datasets.
        split: The split's name.

    Returns:
        The datasets with their tables, in order.

    Raises:
        DataError: Some cannot be opened; the message lists them and those that can be opened.
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
    """Find the Parquet files of one split, in order.

    Args:
        root: The data folder.
        dataset: The dataset.
        split: The split's name. Files of other splits (MMEB-train keeps an old `train-…`) are ignored.

    Returns:
        The files; empty if there are none.

    Raises:
        DataError: Files of the split are missing, or it is there more than once.
    """
    folders = [parent / folder for parent in (root, root / "data") for folder in dataset.folders]
    files = [path for folder in folders for path in split_files(folder, split)]
    return whole_table(files, split) if files else ()


def open_files(files: Sequence[Path], remedy: str = "download it again, or leave it out with --subsets") -> SubsetTable:
    """Open the table in one or several Parquet files; only their metadata is read.

    Args:
        files: The files in order.
        remedy: What to do about a table without rows, for the message.

    Raises:
        DataError: A file is damaged, two columns share a name, or there are no rows.
    """
    from gen2embed_mteb.data_files.parquet import open_parquet

    columns: tuple[str, ...] = ()
    counts: list[int] = []
    for path in files:
        with open_parquet(path) as file:
            names = tuple(file.schema_arrow.names)
            counts.append(file.metadata.num_rows)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: two columns are called {twice[0]!r}; rename one")
        # A column counts only if all files have it.
        columns = tuple(name for name in columns if name in names) if path != files[0] else names
    if not sum(counts):
        raise DataError(f"{files[0]}: the table has no rows; {remedy}")
    return SubsetTable(str(files[0]), columns, sum(counts), tuple(files), tuple(accumulate(counts)))


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
        if not len(loaded):
            raise DataError(f"{hub_id}/{folder}: the table has no rows; leave it out with --subsets")
        return SubsetTable(f"{hub_id}/{folder}", tuple(loaded.column_names), len(loaded), loaded=loaded)
    raise DataError(f"{hub_id}: no subset {dataset.name} with split {split!r} ({failure}); see --subsets, --eval_split")
