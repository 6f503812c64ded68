"""What `Gen2Embed` offers of the generator that it was made of; `reranking/` is imported when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gen2embed_mteb.embedder.preparation.features import PreparesInputs
from gen2embed_mteb.embedder.readouts.readout import run_as_generator

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.reranking.generator import Generator
    from gen2embed_mteb.embedder.reranking.reranker import Reranker


class KeepsGenerator(PreparesInputs):
    """The part of `Gen2Embed` that generates and reranks, with the embedder's own weights."""

    @property
    def generator(self) -> Generator:
        """The generative model of the same tensors: it writes texts and gives the scores of the next token.

        Raises:
            Gen2EmbedError: The folder has no output layer and the embeddings are not tied, or transformers has no
                generative class for the model.
        """
        from gen2embed_mteb.embedder.reranking.generator import Generator

        state: Any = vars(self)
        kept = state.get("_generator")
        # Loading other weights into the embedder puts another base model into its place.
        if kept is None or getattr(kept.model, kept.model.base_model_prefix) is not self[0].model:
            kept = state["_generator"] = Generator(self)
            run_as_generator(kept.model, self[0].model)
        # An output layer of its own does not follow where the embedder is moved.
        inputs = kept.model.get_input_embeddings().weight
        kept.model.get_output_embeddings().to(inputs.device, inputs.dtype)
        found: Generator = kept
        return found

    def reranker(self, framing: str = "mcq") -> Reranker:
        """Return a `CrossEncoder` of the same tensors, which judges pairs of a query and a candidate.

        Args:
            framing: How it is asked: `mcq`, `mcq-both`, `yes-no`, `true-false` or `likelihood`.

        Raises:
            Gen2EmbedError: The framing is unknown, or there is no generator.
        """
        from gen2embed_mteb.embedder.reranking.reranker import Reranker

        return Reranker(self, framing)
