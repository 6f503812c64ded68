"""Writes small data in MMEB's own form for tests: parquet tables, and images of one colour."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}
M = "<|image_1|>"


def write_table(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> Path:
    """Writes rows as parquet; `columns` types an empty or all-null column as string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = columns or tuple(rows[0])
    types = [
        pa.list_(pa.string()) if any(isinstance(row[name], list) for row in rows) else pa.string() for name in names
    ]
    schema = pa.schema(list(zip(names, types, strict=True)))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_images(folder: Path, size: tuple[int, int] = (32, 32)) -> None:
    """One PNG a colour: `FOLDER/red.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", size, colour).save(folder / f"{name}.png")


def eval_row(query: str, query_image: str, candidates: list[tuple[str, str]]) -> dict[str, Any]:
    """A row of evaluation data, V1."""
    return {
        "qry_text": query,
        "qry_img_path": query_image,
        "tgt_text": [text for text, _ in candidates],
        "tgt_img_path": [image for _, image in candidates],
    }


def colour_rows(names: list[str]) -> list[dict[str, Any]]:
    """Image-to-label rows whose candidates are the given colours, the right one first."""
    return [
        eval_row(f"{M}\nName the colour\n", f"img/{name}.png", [(name, "")] + [(o, "") for o in names if o != name])
        for name in names
    ]
