"""A reranker with the methods of mteb's cross-encoder protocol, for its two-stage reranking.

mteb hands over pairs, all candidates of a query one after the other. They are scored together, so that the query's part
is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.reranking.query_scorer import QueryScorer
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import open_input
from gen2embed_mteb.mteb_plugin.models.encoder import Gen2EmbedEncoder
from gen2embed_mteb.mteb_plugin.models.encoder import load as load_encoder
from gen2embed_mteb.mteb_plugin.models.inputs import HeldImages, items_of

MAX_CANDIDATES = 64
"""The most candidates of a query that are held and scored at a time."""


def load(
    name: str, revision: str | None = None, *, framing: str = "mcq", device: str | None = None, **options: Any
) -> Gen2EmbedReranker:
    """Load a reranker; `mteb.get_model` calls this through the model's metadata.

    Args:
        name: The name in mteb's registry.
        revision: Its revision; if it begins with a commit, that commit is loaded from the hub.
        framing: How the model is asked.
        device: `cpu`, `cuda`, …; None stands for the best available device.
        options: As for `encoder.load`.

    Raises:
        Gen2EmbedError: The framing is unknown, or the model has no output layer.
    """
    return Gen2EmbedReranker(load_encoder(name, revision, device=device, **options), framing)


class Gen2EmbedReranker:
    """A cross-encoder for mteb; mteb's batch size is not used.

    Args:
        encoder: The embedding model as an encoder of mteb, whose weights and instructions are used.
        framing: How the model is asked.

    Attributes:
        model: The reranker.
        mteb_model_meta: mteb's metadata of the model; set by mteb.
    """

    mteb_model_meta: Any = None

    def __init__(self, encoder: Gen2EmbedEncoder, framing: str = "mcq") -> None:
        """Build the reranker."""
        self.model = encoder.model.reranker(framing)
        self._encoder = encoder
        self._scorer = QueryScorer(self.model)

    def predict(
        self,
        inputs1: Any,
        inputs2: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float32]:
        """Score pairs.

        Args:
            inputs1: A data loader of mteb with the queries, one per pair.
            inputs2: One with the candidates.
            task_metadata: The task's metadata, with its name and its instruction.
            hf_split: The split, for messages.
            hf_subset: The subset, for messages.
            prompt_type: Not used: the first inputs are queries.
            kwargs: Other arguments of mteb, such as `batch_size`; not used.

        Returns:
            (n,) float32.

        Raises:
            ValueError: A pair cannot be scored; the message names it.
        """
        instruction = self._encoder.instruction(task_metadata, "query")
        scores: list[npt.NDArray[np.float32]] = []
        number = 0
        for query, candidates, images in _groups(inputs1, inputs2, task_metadata, instruction):
            opened = [
                open_input(images, item.text, item.images, ImageOptions(min_side=0)) for item in (query, *candidates)
            ]
            try:
                scores.append(self._scorer.score(opened[0], opened[1:]).scores)
            except ValueError as error:
                where = f"{task_metadata.name}, subset {hf_subset}, split {hf_split}, pairs from {number}"
                raise Gen2EmbedError(f"{where} cannot be scored: {error}; query {query.text[:80]!r}") from error
            number += len(candidates)
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)


def _groups(
    inputs1: Any, inputs2: Any, task_metadata: Any, instruction: str
) -> Iterator[tuple[Item, list[Item], HeldImages]]:
    """Yield each query with candidates that follow one another, and their images."""
    query: Item | None = None
    candidates: list[Item] = []
    images = HeldImages()
    for first, second in zip(inputs1, inputs2, strict=True):
        found = (
            list(items_of(first, "query", task_metadata, instruction, images)),
            list(items_of(second, "document", task_metadata, "", images)),
        )
        for one, other in zip(*found, strict=True):
            if candidates and query is not None and (one != query or len(candidates) == MAX_CANDIDATES):
                yield query, candidates, images
                candidates = []
            query = one
            candidates.append(other)
        kept, images = images, HeldImages()
        for item in (query, *candidates):
            for path in item.images if item is not None else ():
                images.hold(kept.open(path))
    if query is not None and candidates:
        yield query, candidates, images
