"""A page of search results, with the pictures of the rows: one file that fetches nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.encode_command.opening import open_source
from gen2embed_mteb.encode_command.options import STREAM, InputOptions
from gen2embed_mteb.encode_command.rows import Row
from gen2embed_mteb.encode_command.sources import Source
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation import pages
from gen2embed_mteb.images.decoding import decode
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.search_command.index import Hit, Index

PICTURE_SIDE = 320
"""The longer side of a picture on the page, in pixels."""

_STYLE = """
.hits { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
.hit { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .7rem; font-size: .85rem; line-height: 1.4;
  display: flex; flex-direction: column; gap: .4rem; }
.hit img { max-height: 14rem; align-self: center; } .tiny { width: 8rem; image-rendering: pixelated; }
.hit b { font-variant-numeric: tabular-nums; } .id, .fault { opacity: .7; } .fault { color: #c0392b; opacity: 1; }
.query img { max-height: 10rem; }
"""


def page_bytes(
    index: Index,
    hits: Sequence[Hit],
    query: str,
    picture: Image.Image | None,
    *,
    scoring: str,
    notes: Sequence[str],
    remote_images: Sequence[str] = (),
) -> bytes:
    """Return the page.

    Args:
        index: The index.
        hits: The rows that were found, best first.
        query: The text that was searched for.
        picture: The image that was searched for.
        scoring: The name of the score.
        notes: Sentences below the query.
        remote_images: Which images may be read from other machines; what the index was made with does not count, as
            it may come from others.
    """
    rows, fault = _rows_of(index, hits)
    asked = [f"<h1>Nearest to “{pages.plain(query)}”</h1>" if query else "<h1>Nearest to this picture</h1>"]
    if picture is not None:
        asked.append(f"<div class='query'>{pages.picture(picture, 'the query', PICTURE_SIDE)}</div>")
    model = index.manifest["model"]["name"]
    told = [
        f"{len(hits)} of {index.num_vectors:,} rows, by {scoring}, with {model}.",
        *notes,
        *([fault] if fault else []),
    ]
    cards = [_card(rank, hit, rows.get(hit.row), index, remote_images) for rank, hit in enumerate(hits, 1)]
    body = [*asked, f"<p>{html.escape(' '.join(told))}</p>", "<div class='hits'>", *cards, "</div>"]
    return pages.page_bytes("Search", _STYLE, body)


def _card(rank: int, hit: Hit, row: tuple[Row, Source] | None, index: Index, remote_images: Sequence[str]) -> str:
    text = hit.text or (row[0].text if row else "")
    parts = [f"<div><b>{rank}. {hit.score:.4f}</b></div>"]
    if row is not None:
        parts += [_image(image, row[1], index, remote_images) for image in row[0].images]
    parts += [f"<div class='id'>{html.escape(hit.id)}</div>"]
    parts += [f"<div>{pages.plain(text)}</div>"] if text else []
    return f"<div class='hit'>{''.join(parts)}</div>"


def _image(image: str | bytes, source: Source, index: Index, remote_images: Sequence[str]) -> str:
    turned = bool(index.manifest["settings"].get("exif_orientation"))
    try:
        if isinstance(image, bytes):
            opened = decode(io.BytesIO(image), "embedded image", exif_orientation=turned)
        else:
            if source.image_root is None:
                return ""
            follow = bool(index.manifest["data"].get("follow_links"))
            opened = ImageSource(
                source.image_root, follow_links=follow, exif_orientation=turned, remote_images=remote_images
            ).open(image)
    except (ImageError, FileNotFoundError) as error:
        reason = error.reason if isinstance(error, ImageError) else str(error)
        return f"<div class='fault'>{html.escape(reason)}</div>"
    return pages.picture(opened, "", PICTURE_SIDE)


def _rows_of(index: Index, hits: Sequence[Hit]) -> tuple[dict[int, tuple[Row, Source]], str]:
    """Read the rows that were found from the input again, for their pictures.

    Returns:
        The rows by number, and a sentence about the input if it cannot be read or was changed since.
    """
    settings = index.manifest["settings"]
    if settings["kind"] == STREAM:
        return {}, "Pictures of a data set of the hub are not shown."
    try:
        options = InputOptions(**index.manifest["data"])
        source = open_source(options)
        found = _wanted(source, {hit.row for hit in hits}, settings["rows_per_shard"], options)
    except (Gen2EmbedError, OSError, TypeError) as error:
        return {}, f"The input cannot be read, so that its pictures are missing: {error}"
    ids = {hit.row: hit.id for hit in hits}
    same = {number: (row, source) for number, row in found.items() if row.id == ids[number]}
    changed = "The input was changed since it was encoded; some pictures are missing." if len(same) < len(ids) else ""
    return same, changed


def _wanted(source: Source, rows: set[int], size: int, limits: RowLimits) -> dict[int, Row]:
    numbers = {row // size for row in rows}
    found: dict[int, Row] = {}
    last = max(numbers, default=-1)
    for part in source.parts(size):
        if part.number in numbers:
            read: list[Any] = [row for row in source.rows(part, limits) if row.index in rows]
            found |= {row.index: row for row in read if isinstance(row, Row)}
        if part.number >= last:
            break
    return found
