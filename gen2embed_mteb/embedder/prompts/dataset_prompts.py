"""Prompts per dataset: which prompt a model has for a dataset, and the model with these prompts as an encoder.

They are kept where sentence-transformers keeps prompts: `model.prompts["N24News:query"]`. A model with the strategy
`freeret` or `lens` has them for every dataset in `slots`; a user may add others, for any strategy. An exported folder
carries them in `config_sentence_transformers.json`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.embedder.prompts.slots import SLOTS
from gen2embed_mteb.embedder.prompts.strategies import (
    SIDES,
    HierarchicalPrompt,
    dataset_prompt_name,
    prompts_of_datasets,
)
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

BOTH: tuple[Side, Side] = ("query", "document")


def side_of_prompt_name(name: object) -> Side | None:
    """Return the side of a dataset's prompt by its name ("query" for "N24News:query"); `None` for any other name."""
    dataset, _, side = str(name).rpartition(":")
    return SIDES.get(side) if dataset and side in BOTH else None


def renew(model: SentenceTransformer, prompt: HierarchicalPrompt, kept: dict[str, str] | None) -> None:
    """Give a model the prompts of all known datasets under its strategy, and take those of another strategy away.

    Args:
        model: The model.
        prompt: Its strategy.
        kept: Prompts that the caller passed; they stay as they are.
    """
    known = {dataset_prompt_name(dataset, side) for dataset in SLOTS for side in BOTH} - set(kept or {})
    others = {name: text for name, text in model.prompts.items() if name not in known}
    model.prompts = {**others, **{k: v for k, v in prompts_of_datasets(prompt).items() if k in known}}


def all_of(model: SentenceTransformer) -> dict[str, str]:
    """Return all prompts of datasets that a model has, by name."""
    return {name: text for name, text in model.prompts.items() if text and side_of_prompt_name(name) is not None}


def prompts_for(model: SentenceTransformer, dataset: str) -> dict[Side, str]:
    """Return the prompts that a model has for a dataset, by side; none where its usual texts are to be used.

    Args:
        model: The model.
        dataset: The dataset's name.
    """
    found = {side: model.prompts.get(dataset_prompt_name(dataset, side)) for side in BOTH}
    prompts = {side: text for side, text in found.items() if text}
    if not prompts and all_of(model):
        logger.info("%s: no prompts for this dataset are known, the default ones are used", dataset)
    return prompts


class WithDatasetPrompts:
    """A model with the prompts of one dataset, for those who hand `Gen2Embed` itself to bulk encoding.

    Args:
        model: The model.
        prompts: What `prompts_for` returns.
    """

    def __init__(self, model: SentenceTransformer, prompts: dict[Side, str]) -> None:
        """Keep both."""
        self._model, self.prompts = model, prompts

    def encode_query(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode queries, and return (n, d) float32 unit rows."""
        return np.asarray(self._model.encode_query(inputs, prompt=self.prompts.get("query")), np.float32)

    def encode_document(self, inputs: list[dict[str, Any]], /) -> npt.NDArray[np.float32]:
        """Encode candidates, and return (n, d) float32 unit rows."""
        return np.asarray(self._model.encode_document(inputs, prompt=self.prompts.get("document")), np.float32)
