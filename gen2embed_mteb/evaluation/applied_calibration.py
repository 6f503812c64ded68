"""What `gen2embed evaluate` applies to stored vectors: a calibration, a truncation; and whether they fit the model.

Two kinds: the map of a calibrated folder (`gen2embed calibrate`), or `own`: for each dataset, a map fitted on the
dataset's own inputs, queries and candidates, without labels. The second is transductive. Stored vectors are always
those of the model itself, so that all of these share one encoding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.config import OWN, ComparisonOptions, EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap, read_calibrated
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)


def comparison_settings(config: ComparisonOptions) -> dict[str, Any]:
    """Return what decides how vectors are compared, for `results.json`; empty for the plain cosine.

    Args:
        config: The run's settings.

    Raises:
        FileNotFoundError: The calibrated folder does not exist.
        Gen2EmbedError: It has no calibration, or is damaged.
    """
    found: dict[str, Any] = {}
    if config.calibration == OWN:
        found = {"calibration": OWN, "shrinkage": config.shrinkage, "means": config.means}
    elif config.calibration:
        # The folder may be written again with another calibration.
        digest = read_calibrated(config.calibration).map.digest
        found = {"calibration": config.calibration, "calibration_digest": digest}
    if config.truncate_dim is not None:
        found["truncate_dim"] = config.truncate_dim
    if config.scoring != "cosine":
        found |= {"scoring": config.scoring, "csls_neighbors": config.csls_neighbors}
    return found


def stored_map(config: ComparisonOptions) -> AffineMap | None:
    """Return the map of the calibrated folder; `None` without one.

    Raises:
        FileNotFoundError: The calibrated folder does not exist.
        Gen2EmbedError: It has no calibration, or is damaged.
    """
    if config.calibration in ("", OWN):
        return None
    return read_calibrated(config.calibration).map


def require_fitting(model: Gen2Embed, config: ComparisonOptions) -> None:
    """Refuse a calibration or a truncation that does not fit a model; call it before anything is encoded.

    That both have the same weights is not checked: a map may be used for a model that was trained further.

    Args:
        model: The model that is evaluated.
        config: The run's settings.

    Raises:
        Gen2EmbedError: The model has fewer dimensions than are to be compared, it has a calibration of its own, or
            another prompt, readout, pooling or width than the vectors that the calibration was fitted on.
    """
    width = model.get_embedding_dimension()
    if config.truncate_dim is not None and width is not None and config.truncate_dim > width:
        raise Gen2EmbedError(
            f"truncate_dim is {config.truncate_dim}, but vectors of {model.source} have {width} dimensions; pass "
            f"{width} or fewer"
        )
    if not config.calibration:
        return
    if model.calibration is not None:
        raise Gen2EmbedError(
            f"{model.source} has a calibration of its own, and --calibration {config.calibration} would be put behind "
            "it; evaluate the model that it was made of, or leave --calibration out"
        )
    if config.calibration == OWN:
        return
    found = read_calibrated(config.calibration)
    if found.prompt != model.prompt:
        name = "none of gen2embed's" if found.prompt is None else found.prompt.name
        raise Gen2EmbedError(
            f"{found.folder} was calibrated with the prompt {name}, the model has {model.prompt_mode}; pass "
            f"--prompt_mode {name}, or calibrate the model with its own: gen2embed calibrate MODEL OUT --prompt_mode "
            f"{model.prompt_mode}"
        )
    if (found.readout.state, found.readout.norm) != (model.readout, model.readout_norm):
        raise Gen2EmbedError(
            f"{found.folder} was calibrated with readout={found.readout.state}, readout_norm={found.readout.norm}, the "
            f"model has readout={model.readout}, readout_norm={model.readout_norm}; pass the same --readout and "
            "--readout_norm, or calibrate the model with its own"
        )
    if model.pooling != "last":
        raise Gen2EmbedError(
            f"{found.folder} was calibrated with pooling=last, as every saved folder, the model has "
            f"pooling={model.pooling}; leave --pooling out, or pass --calibration {OWN}"
        )
    if width != found.map.width:
        raise Gen2EmbedError(
            f"{found.folder} maps vectors of {found.map.width} dimensions, the model's have {width}; calibrate the "
            "model itself: gen2embed calibrate MODEL OUT"
        )


def warn_about_prompts(config: EvaluationConfig, datasets: Sequence[str]) -> None:
    """Warn of a calibration that was fitted with the usual prompt, where datasets have prompts of their own.

    Args:
        config: The run's settings.
        datasets: The names of the datasets with prompts of their own.
    """
    if not datasets or config.calibration == OWN or not (config.calibration or config.calibrated_on):
        return
    logger.warning(
        "the calibration was fitted on vectors of the prompt that fits any dataset, and is applied to vectors of the "
        "datasets' own prompts: %s; --calibration %s fits one on each dataset, with its prompts",
        ", ".join(datasets),
        OWN,
    )


def refuse_comparison(config: ComparisonOptions, benchmark: str) -> None:
    """Refuse options of comparing on a benchmark whose scores do not use them.

    Args:
        config: The run's settings.
        benchmark: The benchmark's title.

    Raises:
        Gen2EmbedError: A calibration, or another score than the cosine, is asked for.
    """
    if not config.is_plain:
        raise Gen2EmbedError(
            f"{benchmark} compares an image with the captions of its own record, by the cosine: leave --calibration "
            "and --scoring out; a calibrated folder can be evaluated itself, as --model_name"
        )
