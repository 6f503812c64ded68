"""The points of a panel as a Parquet file, which embedding-atlas shows:

    embedding-atlas FILE --x projection_x --y projection_y --text text --image image

or, to let it make its own map, `--vector vector`. Images are reduced to at most 128 pixels a side.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow
import pyarrow.parquet

from gen2embed_mteb.analysis.space.run import Panel
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers

LONGEST = 128
_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def file_of(dataset: str, prompt: str) -> str:
    """Return the name of a panel's file; `:` is no letter of a file's name everywhere."""
    return f"space_{dataset}_{prompt}.parquet".replace(":", "-")


def parquet_bytes(panel: Panel, images: ImageSource) -> bytes:
    """Return the points of a panel as the bytes of a Parquet file.

    One row for each query, then for each candidate: `side`, `number` (within the side), `pair` (the number of a query's
    positive), `class` (the text of that positive), `text`, `image` (the first one: bytes and path), `vector`, and the
    place on the map.

    Args:
        panel: One dataset under one prompt.
        images: The source of the images.

    Raises:
        ImageError: An image can no longer be opened.
    """
    points = panel.points
    classes = points.classes
    texts = [drop_unmatched_markers(item.text, 0).strip() for item in points.candidates]
    numbers = [*classes, *range(len(points.candidates))]
    items = (*points.queries, *points.candidates)
    vectors = [*points.query_vectors, *points.candidate_vectors]
    columns: dict[str, Any] = {
        "side": ["query"] * len(points.queries) + ["candidate"] * len(points.candidates),
        "number": [*range(len(points.queries)), *range(len(points.candidates))],
        "pair": [*classes, *[None] * len(points.candidates)],
        "class": [texts[number] for number in numbers],
        "text": [drop_unmatched_markers(item.text, 0).strip() for item in items],
        "image": pyarrow.array([_image(item, images) for item in items], _IMAGE),
        "vector": pyarrow.array(vectors, pyarrow.list_(pyarrow.float32())),
    }
    if panel.places is not None:
        columns |= {f"projection_{axis}": panel.places[:, number] for number, axis in enumerate("xy")}
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data, compression="zstd")
    return data.getvalue()


def _image(item: Item, images: ImageSource) -> dict[str, Any] | None:
    if not item.images:
        return None
    picture = images.open(item.images[0]).convert("RGB")
    picture.thumbnail((LONGEST, LONGEST))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": item.images[0]}
