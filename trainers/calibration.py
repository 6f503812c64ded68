"""`gen2embed calibrate`: fits a calibration on training pairs, as inputs without labels, and writes the model with it.

The queries and positives of the data are encoded, each distinct one once; which positive belongs to which query is not
used. See `gen2embed_mteb/embedder/calibration/fitting.py` for the map and its cost. Rows that cannot be used are
counted, reported and left out.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import FitOptions
from gen2embed_mteb.embedder.calibration.fitting import CalibrationRecord, Moments, Order, attach, detach, fit
from gen2embed_mteb.embedder.export import empty_directory
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.flags import option
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.mmeb.readers import BadRow
from gen2embed_mteb.names import Side
from trainers.data.config import DataConfig
from trainers.data.training_data import TrainingData, open_training_data

logger = logging.getLogger(__name__)

SIDES: tuple[Side, Side] = ("query", "document")
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(FitOptions, DataConfig):
    """On which inputs a calibration is fitted, and how."""

    data_dir: str = option(
        "inputs to fit on, as pairs: folder, file or hub id, mmeb-mini, or docstrings",
        aliases=["data"],
        needs="a folder, a file, a Hub id, mmeb-mini, or docstrings",
    )
    order: Order = option(
        "order of the dimensions: model, as they are; variance, the largest first, so that vectors may be cut short",
        default="model",
        choices=get_args(Order),
    )
    limit: int | None = option("pairs to fit on, in all subsets together", default=2000, least=1)
    max_error_rate: float = option("share of rejected rows above which nothing is written", default=0.001)

    def __post_init__(self) -> None:
        """Check every value, so that a run does not fail on one later.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        super().__post_init__()
        CalibrationRecord(1000, 1000, self.shrinkage, self.means, order=self.order)


@dataclass(frozen=True)
class Inputs:
    """What a calibration is fitted on.

    Attributes:
        queries: Distinct queries.
        documents: Distinct positives.
        rejected: The rows that cannot be used, with the reason.
    """

    queries: list[Item]
    documents: list[Item]
    rejected: list[BadRow]


def calibrate(model: Gen2Embed, output_dir: str | Path, config: CalibrateConfig) -> str:
    """Fit a calibration and write the model with it.

    Args:
        model: The model; an earlier calibration of it is replaced.
        output_dir: Where to write; the directory must be missing or empty.
        config: On what it is fitted, and how.

    Returns:
        A table of what it was fitted on.

    Raises:
        FileExistsError: `output_dir` is not empty.
        Gen2EmbedError: Too many rows cannot be used, or too few inputs are left.
    """
    output = empty_directory(output_dir)
    if model.truncate_dim is not None:
        raise Gen2EmbedError(
            f"the model truncates vectors to {model.truncate_dim} dimensions; calibrate it in full width: load it "
            "without truncate_dim"
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        data = open_training_data(config, Path(folder) / "images")
        inputs = read(data, config.limit)
        if not model.text_alone and not any(item.images for item in (*inputs.queries, *inputs.documents)):
            logger.warning(
                "%s has texts alone, and the model takes images: what this map does to images was not measured; to "
                "encode images, fit on data with images",
                config.data_dir,
            )
        if model.calibration is not None:
            detach(model)
        # The flag is one of the data; all other image settings are the model's.
        options = replace(model.image_options, exif_orientation=config.exif_orientation)
        sums, num_faults = _encode(model, inputs, data, options, Path(folder) / "vectors")
    num_rejected = len(inputs.rejected) + num_faults
    total = len(inputs.queries) + len(inputs.documents) + len(inputs.rejected)
    if num_rejected > config.max_error_rate * total:
        first = f"; the first: {inputs.rejected[0].file}: {inputs.rejected[0].reason}" if inputs.rejected else ""
        raise Gen2EmbedError(
            f"{num_rejected} of {total} inputs cannot be used{first}; mend them, or raise --max_error_rate"
        )
    settings: dict[str, Any] = {"shrinkage": config.shrinkage, "means": config.means, "order": config.order}
    fitted = fit(*sums, **settings, data=Path(config.data_dir).name)
    attach(model, fitted)
    model.save_pretrained(str(output))
    record = fitted.record
    rows = [["side", "inputs", "cosine of the two means"]]
    cosine = float(sums[0].mean @ sums[1].mean) / float((sums[0].mean ** 2).sum() * (sums[1].mean ** 2).sum()) ** 0.5
    rows += [["queries", f"{record.num_queries:,}", f"{cosine:.3f}"], ["documents", f"{record.num_documents:,}", ""]]
    return as_text(rows)


def read(data: TrainingData, limit: int | None) -> Inputs:
    """Read the first pairs of every subset.

    Args:
        data: The opened data.
        limit: How many pairs, in all subsets together; `None`: all.
    """
    queries: dict[Item, None] = {}
    documents: dict[Item, None] = {}
    rejected: list[BadRow] = []
    number = len(data.subsets)
    for place, subset in enumerate(data.subsets):
        share = None if limit is None else limit // number + (place < limit % number)
        for row in itertools.islice(subset.rows(), share):
            if isinstance(row, BadRow):
                rejected.append(row)
            else:
                queries[row.query] = None
                documents |= dict.fromkeys(row.positives)
    return Inputs(list(queries), list(documents), rejected)


def _encode(
    model: Gen2Embed, inputs: Inputs, data: TrainingData, options: ImageOptions, folder: Path
) -> tuple[list[Moments], int]:
    """Return the sums over the vectors of each side, and how many inputs have no vector."""
    store = EmbeddingStore(folder, {"purpose": "calibration"})
    bulk = BulkEncoder(PrefixEncoder(model), store, data.images, image_options=options)
    sums, num_faults = [], 0
    for side, items in zip(SIDES, (inputs.queries, inputs.documents), strict=True):
        bulk.add(side, items, label=f"{side} inputs")
        usable = []
        for item in items:
            if (fault := bulk.fault(side, item)) is None:
                usable.append(item)
            else:
                num_faults += 1
                logger.warning("%s: %s", fault.file or item.text[:40], fault.reason)
        width = bulk.vectors(side, usable[:1]).shape[1] if usable else 1
        moments = Moments(width)
        for start in range(0, len(usable), _CHUNK):
            moments.add(bulk.vectors(side, usable[start : start + _CHUNK]))
        sums.append(moments)
    return sums, num_faults


def run(options: dict[str, Any], model: str, output_dir: str, config: CalibrateConfig) -> str:
    """Load a model and calibrate it; see `calibrate`.

    Args:
        options: Options of `Gen2Embed`.
        model: Hub id, directory or short name.
        output_dir: Where to write.
        config: On what it is fitted, and how.
    """
    empty_directory(output_dir)  # before the model is loaded, which can take minutes
    return calibrate(Gen2Embed(model, **options), output_dir, config)
