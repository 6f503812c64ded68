"""From inputs to the features of the model: opened, cut to a length, rendered and tokenized.

The part of `Gen2Embed` that does not depend on how the model was loaded, or on what is made of its vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from gen2embed_mteb.embedder.chat_formats.header import prompt_of
from gen2embed_mteb.embedder.chat_formats.probing import takes_images
from gen2embed_mteb.embedder.families import Family, ImageLayout, family_of
from gen2embed_mteb.embedder.passes.phrase_pooling import PHRASE_LENGTH, check_ends, phrase_tokens
from gen2embed_mteb.embedder.preparation.image_tokens import Renderer
from gen2embed_mteb.embedder.preparation.inputs import Content, content_of, rough_length
from gen2embed_mteb.embedder.preparation.truncation import Fitter
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt, side_of
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import Size
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.names import Pooling, Side

NO_LIMIT = 10**9
"""A length that limits nothing; tokenizers without a limit state an astronomical one."""


class PreparesInputs(SentenceTransformer):
    """A `SentenceTransformer` that takes the inputs of `inputs.content_of`; see `Gen2Embed`."""

    source: str
    image_root: str | Path | None
    image_options: ImageOptions
    _layout: ImageLayout
    _pooling: Pooling

    @property
    def _family(self) -> Family:
        return family_of(self[0].config.model_type)

    @property
    def takes_images(self) -> bool:
        """Whether inputs may have images; a model with a tokenizer alone takes text."""
        return takes_images(self.processor)

    @property
    def text_alone(self) -> str:
        """Why no input may have images, for messages; empty if the model takes them."""
        kind = self[0].config.model_type
        return "" if self.takes_images else f"{self.source} takes text alone (model type {kind!r})"

    def preprocess(self, inputs: list[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn inputs into model features: open them, cut them to `max_seq_length`, render and tokenize them.

        Args:
            inputs: What `inputs.content_of` accepts.
            prompt: A system prompt of the caller that replaces the strategy's.
            kwargs: `task` ("query" or "document"), `max_length`, `processing_kwargs`, as in sentence-transformers.

        Raises:
            ImageError: An image cannot be opened, or would have to be enlarged beyond the limit.
            TypeError: An input is of a type that `content_of` does not accept.
            ValueError: An input cannot be made to fit into `max_length`.
        """
        if len(inputs) == 0:
            return {}
        if kwargs.get("task") is not None:
            kwargs["task"] = side_of(kwargs["task"], "task")
        # Truncation happens here, on the text alone. The tokenizer is never asked to truncate, so that a saved
        # tokenizer carries no truncation state.
        processing = {key: dict(value) for key, value in (kwargs.pop("processing_kwargs", None) or {}).items()}
        asked = processing.get("text", {}).pop("max_length", None)
        max_length = asked or kwargs.pop("max_length", None) or self.max_seq_length
        kwargs.pop("max_length", None)
        processing["text"] = {**processing.get("text", {}), "truncation": False}

        contents = self.fitted(inputs, prompt, task=kwargs.get("task"), max_length=max_length)
        messages = [content.as_messages() for content in contents]
        features: dict[str, Any] = super().preprocess(messages, processing_kwargs=processing, **kwargs)
        if self._pooling == "phrase":
            features[PHRASE_LENGTH] = self._phrase_lengths(contents, kwargs.get("task"), features)
        if self._layout != "native" and "mm_token_type_ids" in features:
            # Image tokens count as text, which gives every token its plain 1-D position.
            features["mm_token_type_ids"] = torch.zeros_like(features["mm_token_type_ids"])
        return features

    def fitted(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        *,
        task: str | None = None,
        max_length: int | None = None,
    ) -> list[Content]:
        """Open inputs and cut them to a length.

        Args:
            inputs: What `inputs.content_of` accepts.
            prompt: A system prompt of the caller that replaces the strategy's.
            task: "query", "document", or `None`.
            max_length: Longest input in tokens; `None`: no limit.

        Raises:
            ImageError: An image cannot be opened, or would have to be enlarged beyond the limit.
            TypeError: An input is of a type that `content_of` does not accept.
            ValueError: An input cannot be made to fit into `max_length`.
        """
        contents = [self._content(sample) for sample in inputs]
        if prompt:
            contents = [Content(c.text, c.images, prompt if c.system is None else prompt + c.system) for c in contents]
        if max_length is None or max_length >= NO_LIMIT:
            return contents
        fitter = self._fitter(task)
        return [fitter.fit(content, max_length) for content in contents]

    def count_tokens(
        self,
        texts: Sequence[str],
        image_sizes: Sequence[Sequence[Size]],
        task: str | None = None,
        prompt: str | None = None,
    ) -> list[int]:
        """Return the lengths of inputs in tokens, prompt and images included, without opening or rendering any input.

        Args:
            texts: n texts.
            image_sizes: For each text the (width, height) in pixels of its images.
            task: "query", "document", or `None`.
            prompt: A prompt of the caller that `preprocess` will be given.

        Returns:
            n lengths, each at most `max_seq_length`. A length may be wrong by a token or two, where the tokens of text
            and prompt merge.
        """
        resized = [[fitted_size(size, self.image_options) for size in sizes] for sizes in image_sizes]
        lengths = self._fitter(task, prompt or None).count_all(texts, resized)
        longest = self.max_seq_length
        return lengths if longest is None else [min(length, longest) for length in lengths]

    def render(self, sample: Any, task: str | None = None, prompt: str | None = None) -> str:
        """Return the conversation as the model reads it, with one marker per image.

        Args:
            sample: One input.
            task: "query", "document", or `None`.
            prompt: A prompt of the caller.
        """
        return self._rendered(self.fitted([sample], prompt)[0], task)

    def _rendered(self, content: Content, task: str | None) -> str:
        return str(
            self.processor.apply_chat_template(
                content.as_messages(),
                tokenize=False,
                add_generation_prompt=True,
                **({} if task is None else {"task": task}),
            )
        )

    def _phrase_lengths(self, contents: Sequence[Content], side: Side | None, features: dict[str, Any]) -> torch.Tensor:
        """Return how many tokens the phrase of each input has, (n,) int64; rows must end in these tokens."""
        known: dict[str | None, list[int]] = {}
        for system in dict.fromkeys(content.system for content in contents):
            prompt = prompt_of(self.processor.chat_template) or HierarchicalPrompt()
            phrase = prompt.with_caller(system).phrase(side)
            known[system] = phrase_tokens(self.tokenizer, self._rendered(Content("a", (), system), side), phrase)
        phrases = [known[content.system] for content in contents]
        check_ends(features["input_ids"], features["attention_mask"], phrases)
        return torch.tensor([len(phrase) for phrase in phrases], dtype=torch.int64)

    def _content(self, sample: Any) -> Content:
        content = content_of(sample, self.image_root, self.image_options)
        if content.images and not self.takes_images:
            raise Gen2EmbedError(
                f"{self.text_alone}, and the input has {len(content.images)} image(s): leave them out, or use a "
                "multimodal model"
            )
        if not self._family.writes_special_tokens:
            content = replace(content, text=self._broken_up(content.text))
        return content

    def _broken_up(self, text: str) -> str:
        """Return the text with a space inside every control token, so that the tokenizer reads it as plain text."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        for token in dict.fromkeys([*self.tokenizer.all_special_tokens, *added]):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _fitter(self, side: str | None, prompt: str | None = None) -> Fitter:
        """Return what counts and cuts the inputs of a side."""
        return Fitter(Renderer(self[0], self[0].processing_kwargs["chat_template"], side), prompt)

    def _input_length(self, sample: Any) -> int:
        """Return roughly the number of tokens, the key by which sentence-transformers sorts; images all count alike."""
        return rough_length(sample)
