"""`gen2embed search`: opens an index, loads its model, prints the nearest rows, and writes a page of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.encode_command.model import load, options_from
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.flags import add_flags, from_flags
from gen2embed_mteb.images.decoding import open_image
from gen2embed_mteb.images.resizing import ImageOptions, fitted
from gen2embed_mteb.search_command.index import Hit, Index
from gen2embed_mteb.search_command.options import SearchOptions
from gen2embed_mteb.storage.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from PIL import Image

WRITER = "search"
_SHOWN = 60
"""Characters of a text that the terminal shows."""


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_flags(parser, SearchOptions)


def run_command_with(arguments: argparse.Namespace) -> None:
    """Search, print the nearest rows, and write the page.

    Args:
        arguments: The parsed flags.

    Raises:
        Gen2EmbedError: The index, the query or the model cannot be used.
    """
    options = from_flags(SearchOptions, arguments)
    # The index, the query and the page are checked before a model is loaded, which can take minutes.
    index = Index(options.index)
    image_options = _image_options(index)
    picture = None
    if options.image:
        picture = open_image(Path(options.image).expanduser(), exif_orientation=image_options.exif_orientation)
    page = Path(options.html).expanduser() if options.html else None
    if page is not None:
        OwnedFolder(page.parent, WRITER).check([page.name], [options.image] if options.image else [])
    query = _query_vector(options, index, picture, image_options)
    neighbors = options.csls_neighbors if options.scoring == "csls" else None
    hits = index.search(query, options.top, csls_neighbors=neighbors, csls_sample=options.csls_sample)
    notes = []
    if neighbors is not None:
        size = min(options.csls_sample, index.num_vectors)
        notes.append(f"Transductive: {size:,} rows of the index itself decide how much is subtracted from each.")
    _say(text_table(hits, options.scoring))
    _say("".join(f"\n{note}" for note in notes).lstrip("\n") or f"\n{index.num_vectors:,} rows were compared")
    if page is not None:
        from gen2embed_mteb.search_command.page import page_bytes

        data = page_bytes(
            index,
            hits,
            options.query,
            picture,
            scoring=options.scoring,
            notes=notes,
            remote_images=options.remote_images,
        )
        _say(f"\nWritten to {OwnedFolder(page.parent, WRITER).write(page.name, data)}")


def text_table(hits: list[Hit], scoring: str) -> str:
    """Return the rows that were found as a table for the terminal."""
    header = ["rank", scoring, "row", "id"]
    rows = [[str(rank), f"{hit.score:.4f}", str(hit.row), _short(hit.id)] for rank, hit in enumerate(hits, 1)]
    if any(hit.text for hit in hits):
        widest = max(len(_short(hit.text)) for hit in hits)
        header.append("text".ljust(widest))
        rows = [[*row, _short(hit.text).ljust(widest)] for row, hit in zip(rows, hits, strict=True)]
    return as_text([header, *rows])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in (line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"))


def _image_options(index: Index) -> ImageOptions:
    settings = index.manifest["settings"]
    names = ("resize", "min_side", "exif_orientation")
    return ImageOptions(**{name: settings[name] for name in names if name in settings})


def _query_vector(
    options: SearchOptions, index: Index, picture: Image.Image | None, image_options: ImageOptions
) -> Any:
    from gen2embed_mteb.embedder.fingerprint import fingerprint

    given = {"model_name": options.model_name} if options.model_name else {}
    model = load(options_from(index.manifest["model"], device=options.device, **given), image_options.min_side)
    if not options.any_model and (found := fingerprint(model)) != index.manifest["fingerprint"]:
        raise Gen2EmbedError(
            f"{options.model_name or index.manifest['model']['name']} is not the model that {index.folder} was made "
            f"with: its fingerprint is {found[:12]}…, that of the index {index.manifest['fingerprint'][:12]}…; pass "
            "that model as --model_name, encode the data again, or pass --any_model to search all the same"
        )
    if picture is not None and model.text_alone:
        raise Gen2EmbedError(f"{model.text_alone}; leave --image out")
    entry: dict[str, Any] = {"text": options.query} if options.query else {}
    if picture is not None:
        entry["image"] = fitted(picture, image_options, options.image)
    return model.encode_query([entry], show_progress_bar=False)[0]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
