"""`Generator`: the embedder's own weights, which write texts and give the scores of the next token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers.util import batch_to_device

from gen2embed_mteb.embedder.model_folder.adapters import has_adapter
from gen2embed_mteb.embedder.reranking.framings import plain_template
from gen2embed_mteb.embedder.reranking.generation_model import generation_model
from gen2embed_mteb.embedder.reranking.generation_module import generation_module

_OF_SENTENCE_TRANSFORMERS = ("modality", "logits_to_keep", "num_images_per_sample", "num_videos_per_sample")


class Generator:
    """The generative model that an embedder was made of; both share every weight.

    What it reads is the user's input without the embedding prompt, in the model's own chat format.

    Args:
        embedder: The embedding model.

    Attributes:
        model: The generative model of transformers.
        module: The stock `Transformer` module around it.

    Raises:
        Gen2EmbedError: There is no generative class for the model, or no output layer (see `generation_model`).
    """

    def __init__(self, embedder: Any) -> None:
        """Build the generative model around the embedder's own base model."""
        self._embedder = embedder
        self.model = generation_model(embedder, embedder.source, embedder.revision)
        self.template = plain_template(embedder.processor.chat_template, embedder._family)
        self.module = generation_module(embedder[0], self.model, self.template)

    @torch.inference_mode()
    def generate(
        self, inputs: Sequence[Any], *, max_new_tokens: int = 32, adapters: bool = True, **options: Any
    ) -> list[str]:
        """Write the answer of the model to each input, by default the most probable token at every step.

        Args:
            inputs: n inputs, each what `encode_query` takes; a conversation may have a system turn.
            max_new_tokens: The most tokens of an answer.
            adapters: Whether attached adapters take part; they were trained to embed.
            options: Further arguments of `generate` of transformers.

        Returns:
            n texts, without control tokens.
        """
        features = self._features(inputs)
        if not features:
            return []
        given = {"do_sample": False, "use_cache": True, "pad_token_id": self.module.tokenizer.pad_token_id, **options}
        if not given["do_sample"] and "generation_config" not in options:
            # Settings of sampling in generation_config.json; transformers warns about them where nothing is sampled.
            given = {"temperature": None, "top_p": None, "top_k": None, **given}
        with self._adapters(adapters):
            written = self.model.generate(**features, max_new_tokens=max_new_tokens, **given)
        answers = written[:, features["input_ids"].shape[1] :]
        texts: list[str] = self.module.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def next_token_scores(self, inputs: Sequence[Any], *, adapters: bool = True) -> torch.Tensor:
        """Return the log-probabilities of the first token of each answer.

        Args:
            inputs: n inputs, each what `encode_query` takes.
            adapters: Whether attached adapters take part.

        Returns:
            (n, vocabulary) float32.
        """
        features = self._features(inputs)
        if not features:
            return torch.empty(0, self.model.get_input_embeddings().num_embeddings)
        with self._adapters(adapters):
            logits = self.model(**features, logits_to_keep=1).logits[:, -1]
        scores: torch.Tensor = logits.float().log_softmax(dim=-1)
        return scores

    def _features(self, inputs: Sequence[Any]) -> dict[str, Any]:
        if isinstance(inputs, str):
            raise TypeError(f"inputs must be a list of inputs, got the text {inputs[:40]!r}; pass [text]")
        if len(inputs) == 0:
            return {}
        messages = [self._embedder._content(one).as_messages() for one in inputs]
        features = self.module.preprocess(messages, processing_kwargs={"text": {"truncation": False}})
        moved = batch_to_device(features, self._embedder.device)
        return {name: value for name, value in moved.items() if name not in _OF_SENTENCE_TRANSFORMERS}

    @contextmanager
    def _adapters(self, wanted: bool) -> Iterator[None]:
        """Run without adapters if they are not wanted, and leave them as they were."""
        if wanted or not has_adapter(self.model):
            yield
            return
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        layers = [one for one in self.model.modules() if isinstance(one, kinds) and not one.disable_adapters]
        trained = [(one, one.requires_grad) for one in self.model.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, requires_grad in trained:  # peft changes these with the switch
                parameter.requires_grad_(requires_grad)
