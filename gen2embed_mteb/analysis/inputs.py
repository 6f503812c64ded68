"""The inputs of an analysis: rows of MMEB's datasets, read as the evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from gen2embed_mteb.analysis.options import DataOptions
from gen2embed_mteb.data_files.rows import BadRow
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RowError, find_images
from gen2embed_mteb.images.decoding import open_image
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource, open_input
from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure
from gen2embed_mteb.mini.places import evaluation_places
from gen2embed_mteb.mmeb.datasets import MMEB, Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.readers import EvalRow, eval_columns, read_eval_rows
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers
from gen2embed_mteb.mmeb.tables import SubsetTable, open_subsets
from gen2embed_mteb.names import Side

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (MMEB, MMEB_MINI)}


class OpenedData(NamedTuple):
    """Datasets whose tables were found and checked, and the source of their images."""

    tables: list[tuple[DatasetInfo, SubsetTable]]
    images: ImageSource


def open_data(options: DataOptions, *, exif_orientation: bool = False) -> OpenedData:
    """Open the tables of the chosen datasets; MMEB-mini is drawn if it is not there.

    Args:
        options: Which datasets.
        exif_orientation: Whether images are turned as their EXIF data says.

    Raises:
        DataError: A dataset or a column is missing, or a file is damaged.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: A dataset is unknown, `data_dir` is missing, or an address in `remote_images` cannot be read.
    """
    options.check_remote()
    chosen = BENCHMARKS[options.benchmark].select(options.subsets)
    data_dir, image_dir = options.data_dir, options.image_dir
    if options.benchmark == MMEB_MINI.name:
        data_dir, image_dir = map(str, evaluation_places(ensure("eval", data_dir or None)))
    if not data_dir:
        raise Gen2EmbedError(f"--data_dir is needed for --benchmark {options.benchmark}; mmeb-mini needs none")
    tables = open_subsets(data_dir, chosen.datasets, options.split)
    for dataset, table in tables:
        table.require(eval_columns(dataset, table.columns))
    images = find_images(
        data_dir,
        image_dir,
        follow_links=options.follow_links,
        exif_orientation=exif_orientation,
        remote_images=options.remote_images,
    )
    return OpenedData(tables, images)


def rows_of(
    dataset: DatasetInfo, table: SubsetTable, options: DataOptions, limit: int | None
) -> Iterator[EvalRow | RowError]:
    """Read the rows of a dataset; a row that cannot be used comes as the reason why.

    Args:
        dataset: The dataset.
        table: Its table.
        options: The limits of a row.
        limit: The most rows.
    """
    for row in read_eval_rows(table, dataset, limit, options):
        yield RowError(dataset.name, row.index, row.file, row.reason) if isinstance(row, BadRow) else row


def candidate_side(dataset: DatasetInfo) -> Side:
    """Return the side on which a dataset's candidates are encoded."""
    return "query" if dataset.candidates_as_queries else "document"


class AskedInput(NamedTuple):
    """One input of an analysis.

    Attributes:
        label: The dataset and row that it is of; empty for an input of the caller.
        side: Its side.
        given: The input as `Gen2Embed` takes it; its images are opened.
    """

    label: str
    side: Side
    given: dict[str, Any]

    @property
    def text(self) -> str:
        """Its text without marks of images."""
        return drop_unmatched_markers(self.given.get("text", ""), 0).strip()


def opened_rows(
    data: OpenedData, options: DataOptions, errors: list[RowError]
) -> Iterator[tuple[AskedInput, AskedInput]]:
    """Return the query and the positive of the first rows of each dataset, opened.

    Args:
        data: The datasets.
        options: How many rows, and the limits of each.
        errors: Gets the rows that cannot be used.
    """
    for dataset, table in data.tables:
        for row in rows_of(dataset, table, options, options.limit):
            if isinstance(row, RowError):
                errors.append(row)
                continue
            label, items = f"{dataset.name} {row.index}", (row.query, row.candidates[0])
            try:
                query, positive = (open_input(data.images, one.text, one.images, ImageOptions()) for one in items)
            except ImageError as error:
                errors.append(RowError(dataset.name, row.index, error.file, error.reason))
                continue
            yield AskedInput(label, "query", query), AskedInput(label, candidate_side(dataset), positive)


def own_input(text: str, image: str) -> dict[str, Any]:
    """Return an input of the caller, with its image opened.

    Args:
        text: Its text, or an empty one.
        image: The path of its image, or an empty one.

    Raises:
        ImageError: The image cannot be opened.
    """
    given: dict[str, Any] = {"text": text} if text else {}
    return given | ({"image": open_image(image)} if image else {})
