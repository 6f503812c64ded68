"""Encodes datasets under several prompts, and gives their numbers and maps.

1. All rows are read and checked before the model encodes anything.
2. Each prompt is set on the model in turn; vectors are stored, so that a run that was killed goes on.
3. For each dataset and prompt: the numbers, and the places on a map of queries and candidates together.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.analysis.inputs import OpenedData, open_data
from gen2embed_mteb.analysis.options import SpaceOptions
from gen2embed_mteb.analysis.space.numbers import SpaceNumbers, numbers_of
from gen2embed_mteb.analysis.space.points import DatasetRows, Points, encode, kind_of
from gen2embed_mteb.analysis.space.projection import TITLES, check_projection, projected
from gen2embed_mteb.evaluation.run import RowError, open_bulk_encoder, refuse_images
from gen2embed_mteb.evaluation.tables import Table, as_text, percent
from gen2embed_mteb.mmeb.evaluate import images_in

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


@dataclass(frozen=True)
class Panel:
    """One dataset under one prompt.

    Attributes:
        dataset: The dataset's name.
        prompt: The prompt's name.
        points: The inputs and their vectors.
        numbers: The figures.
        places: (n + m, 2), of the queries and then the candidates; `None` without a map.
    """

    dataset: str
    prompt: str
    points: Points
    numbers: SpaceNumbers
    places: npt.NDArray[np.float64] | None


@dataclass(frozen=True)
class SpaceResult:
    """All panels.

    Attributes:
        model: The model's name.
        projection: The name of the projection.
        datasets: The names of the datasets.
        prompts: The names of the prompts.
        panels: For each dataset, one panel for each prompt.
    """

    model: str
    projection: str
    datasets: tuple[str, ...]
    prompts: tuple[str, ...]
    panels: tuple[tuple[Panel, ...], ...]

    @property
    def errors(self) -> tuple[RowError, ...]:
        """The rows that were set aside, each once."""
        return tuple(dict.fromkeys(error for row in self.panels for panel in row for error in panel.points.errors))

    @property
    def error_rate(self) -> float:
        """The share of rows that were set aside."""
        good = sum(len(row[0].points.pairs) for row in self.panels)
        return len(self.errors) / max(1, len(self.errors) + good)


def open_rows(options: SpaceOptions) -> tuple[OpenedData, list[DatasetRows]]:
    """Check the projection, and read the rows of every dataset; nothing is encoded.

    Args:
        options: What is to be drawn.

    Raises:
        Gen2EmbedError: The projection is not installed, or data cannot be used.
    """
    check_projection(options.projection)
    named = replace(options, subsets=options.names)
    data = open_data(named, exif_orientation=options.exif_orientation)
    return data, [DatasetRows.read(dataset, table, options) for dataset, table in data.tables]


def analyze_space(
    model: Gen2Embed, options: SpaceOptions, folder: Path, data: OpenedData, rows: list[DatasetRows]
) -> SpaceResult:
    """Encode datasets under several prompts; the model has the last of them afterwards.

    Args:
        model: The model.
        options: What is drawn.
        folder: Where the vectors are kept.
        data: What `open_rows` returned.
        rows: Likewise.

    Raises:
        Gen2EmbedError: The model takes text alone and a dataset has images, it is calibrated, or no row of a dataset
            has a vector.
    """
    from gen2embed_mteb.embedder.fingerprint import fingerprint
    from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder

    refuse_images(model.text_alone, images_in(data.tables, options.limit, options))
    columns: list[list[Panel]] = []
    for name in options.prompts:
        model.set_prompt(name)
        bulk = open_bulk_encoder(
            PrefixEncoder(model),
            options,
            data.images,
            folder=folder / model.prompt_mode.replace(":", "-"),
            fingerprint=fingerprint(model),
        )
        columns.append([_panel(model.prompt_mode, one, encode(bulk, one), options.projection) for one in rows])
    return SpaceResult(
        model=model.source,
        projection=options.projection,
        datasets=tuple(one.dataset.name for one in rows),
        prompts=tuple(column[0].prompt for column in columns),
        panels=tuple(zip(*columns, strict=True)),
    )


def _panel(prompt: str, rows: DatasetRows, points: Points, projection: str) -> Panel:
    places = None
    if projection != "none":
        places = projected(np.concatenate([points.query_vectors, points.candidate_vectors]), projection)
    numbers = numbers_of(points.query_vectors, points.candidate_vectors, points.pairs)
    return Panel(rows.dataset.name, prompt, points, numbers, places)


HEAD = ("prompt", "centroids", "cos pairs", "cos others", "gap", "side %", "R@1 %")
LEGEND = (
    "centroids: distance of the mean query from the mean candidate; cos: mean cosine; gap: of pairs less of others; "
    "side: how often a linear classifier tells queries from candidates (50: it cannot); R@1: among the candidates shown"
)


def cells_of(numbers: SpaceNumbers) -> list[str]:
    """Return the figures as they are printed."""
    cosines = (numbers.pair_cosine, numbers.other_cosine, numbers.cosine_gap)
    return [
        f"{numbers.centroid_distance:.3f}",
        *("-" if one is None else f"{one:.3f}" for one in cosines),
        percent(numbers.side_accuracy),
        percent(numbers.recall_at_1),
    ]


def text_table(result: SpaceResult) -> str:
    """Return the numbers of every dataset as a text."""
    parts = []
    for row in result.panels:
        points = row[0].points
        rows: Table = [list(HEAD), *([panel.prompt, *cells_of(panel.numbers)] for panel in row)]
        parts.append(
            f"{row[0].dataset}: {len(points.queries)} queries ({kind_of(points.queries)}), "
            f"{len(points.candidates)} candidates ({kind_of(points.candidates)})\n\n{as_text(rows)}\n"
        )
    return "\n".join([*parts, LEGEND])


def as_json(result: SpaceResult) -> dict[str, Any]:
    """Return the numbers for `space.json`."""
    return {
        "model": result.model,
        "projection": TITLES.get(result.projection, result.projection),
        "datasets": {
            row[0].dataset: {
                "queries": kind_of(row[0].points.queries),
                "candidates": kind_of(row[0].points.candidates),
                "prompts": {panel.prompt: asdict(panel.numbers) for panel in row},
            }
            for row in result.panels
        },
        "errors": [error._asdict() for error in result.errors],
    }
