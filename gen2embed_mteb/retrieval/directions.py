"""The ranks of a dataset in both directions, with the calibration and the score that a run asks for.

Each direction is a search of its own, as `MSCOCO_t2i` and `MSCOCO_i2t` are in MMEB: a map that is fitted on own inputs
is fitted on the direction's distinct queries and candidates, and CSLS takes the direction's distinct queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
from gen2embed_mteb.mmeb.comparison import Comparison, calibrated, first_of_each, refuse_too_few, with_csls
from gen2embed_mteb.names import Side
from gen2embed_mteb.retrieval.datasets import CaptionedImage
from gen2embed_mteb.retrieval.scoring import DIRECTIONS, Ranks, ranks_of


def image_item(row: CaptionedImage) -> Item:
    """Return the image of a row as an input: without text."""
    return Item("", (row.image,))


def caption_items(row: CaptionedImage) -> list[Item]:
    """Return the captions of a row as inputs: without image."""
    return [Item(caption) for caption in row.captions]


def require_own_inputs(name: str, rows: Sequence[CaptionedImage]) -> None:
    """Refuse a dataset with too few inputs to fit a map on; call it before anything is encoded.

    Args:
        name: The dataset's name.
        rows: Its rows.

    Raises:
        Gen2EmbedError: There are too few; the message names their number.
    """
    distinct = {image_item(row) for row in rows} | {item for row in rows for item in caption_items(row)}
    refuse_too_few(name, len(distinct))


def ranks_both_ways(
    name: str,
    bulk: BulkEncoder,
    rows: Sequence[CaptionedImage],
    config: EvaluationConfig,
    stored: AffineMap | None,
) -> tuple[dict[str, Ranks], dict[str, int]]:
    """Return, by direction, the ranks, and how many of the dataset's own inputs were used for them.

    Args:
        name: The dataset's name, for messages.
        bulk: Where images and captions were encoded, on both sides.
        rows: The rows, all of whose inputs have vectors.
        config: The run's settings.
        stored: The map of the calibrated folder, if the settings name one.

    Raises:
        Gen2EmbedError: A map is to be fitted and there are too few inputs, or the stored map is of another width.
    """
    images = [image_item(row) for row in rows]
    captions = [item for row in rows for item in caption_items(row)]
    of_images = np.arange(len(rows), dtype=np.int64)
    of_captions = np.repeat(of_images, [len(row.captions) for row in rows])
    searches = {
        DIRECTIONS[0]: (captions, images, of_captions, of_images),
        DIRECTIONS[1]: (images, captions, of_images, of_captions),
    }
    ranks: dict[str, Ranks] = {}
    used: dict[str, int] = {}
    for direction, (queries, candidates, mine, theirs) in searches.items():
        items: dict[Side, list[Item]] = {"query": queries, "document": candidates}
        found = _compared(f"{name}, {direction}", bulk, items, config, stored)
        ranks[direction] = ranks_of(found.vectors["query"], found.vectors["document"], mine, theirs, found.hubs)
        used[direction] = found.num_unlabelled
    return ranks, used


def _compared(
    name: str,
    bulk: BulkEncoder,
    items: Mapping[Side, Sequence[Item]],
    config: EvaluationConfig,
    stored: AffineMap | None,
) -> Comparison:
    """Return the vectors of a direction's queries and candidates as they are compared."""
    found = Comparison({side: bulk.vectors(side, of_side) for side, of_side in items.items()})
    if not config.comparison:
        return found
    distinct = {side: first_of_each([bulk.content(item) for item in of_side]) for side, of_side in items.items()}
    if config.calibration:
        found = calibrated(name, found.vectors, distinct=distinct, config=config, stored=stored)
    found = found.cut(config.truncate_dim)
    if config.scoring == "csls":
        found = with_csls(found, distinct["query"], "document", config.csls_neighbors)
    return found
