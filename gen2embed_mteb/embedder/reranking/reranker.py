"""`Reranker`: a `CrossEncoder` of the embedder's own weights, which judges whether a candidate matches a query.

The question about a pair stands in the chat template, which reads the roles "query" and "document". The score is the
difference of the logits of two answers. All of this is stock: `save` writes a folder that plain `CrossEncoder` loads.
Two framings are not: `mcq-both` asks twice, `likelihood` scores the candidate's text.
Cost: one forward pass over query, candidate and question per pair; `mcq-both` and `likelihood` take two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.util import batch_to_device

from gen2embed_mteb.embedder.chat_formats.probing import control_tokens
from gen2embed_mteb.embedder.model_folder import saving
from gen2embed_mteb.embedder.model_folder.checked_loading import prepare_tokenizer, set_template
from gen2embed_mteb.embedder.preparation.inputs import Content, described, rough_length
from gen2embed_mteb.embedder.readouts.readout import generator_parts
from gen2embed_mteb.embedder.reranking.answers import answer_tokens, option_tokens
from gen2embed_mteb.embedder.reranking.framings import (
    FRAMINGS,
    SWAPPED,
    Framing,
    framing_of,
    pair_template,
    stock_framing,
)
from gen2embed_mteb.embedder.reranking.generation_model import generation_class
from gen2embed_mteb.embedder.reranking.generation_module import generation_module
from gen2embed_mteb.embedder.reranking.health import OPTIONS, Answers, Health, option_probabilities
from gen2embed_mteb.embedder.reranking.likelihood import log_probabilities, with_answers
from gen2embed_mteb.embedder.reranking.pairs import Pair, shortened
from gen2embed_mteb.errors import Gen2EmbedError

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.reranking.query_scorer import QueryScorer

logger = logging.getLogger(__name__)

NO_LIMIT = 10**9
_SECOND, _ANSWERS = "gen2embed_second", "gen2embed_answers"
"""Features of our own: those of the second question, and the tokens of the candidates."""


class Reranker(CrossEncoder):
    """A `CrossEncoder` that shares every weight with an embedder: `predict` scores pairs, `rank` sorts candidates.

    A pair is (query, candidate); each side is what `encode_query` takes: a text, an image, or a dict with both. Scores
    are log-odds (of "likelihood": differences of log-probabilities), unbounded, so that they do not tie where a
    probability would be rounded to 1; `activation_fn=torch.nn.Sigmoid()` gives probabilities. `rank` keeps candidates
    of equal score in the order in which they are given.

    Args:
        embedder: The embedding model. Adapters that are attached to it take part.
        framing: A name in `framings.FRAMINGS`.

    Attributes:
        framing: The framing in use.
        health: What was seen of the answers in the last call of `predict` or `rank`; `None` with `likelihood`.

    Raises:
        Gen2EmbedError: The framing is unknown, there is no output layer, or the tokenizer begins both answers with the
            same token.
    """

    def __init__(self, embedder: Any, framing: str = "mcq") -> None:
        """Build the modules around the embedder's base model."""
        self.framing: Framing = framing_of(framing)
        generator = embedder.generator
        control = control_tokens(embedder.processor)
        template = pair_template(generator.template, self.framing, control)
        module = generation_module(embedder[0], generator.model, template)
        module.processing_kwargs = {"chat_template": {"add_generation_prompt": True}}
        rendered = module.processor.apply_chat_template(
            Pair(Content("a"), Content("b")).as_messages(),
            tokenize=False,
            add_generation_prompt=True,
        )
        options = (self.framing.yes or FRAMINGS["mcq"].yes, self.framing.no or FRAMINGS["mcq"].no)
        tokens = option_tokens(module.tokenizer, rendered, options)
        super().__init__(
            modules=[module, LogitScore(*tokens)], device=str(embedder.device), activation_fn=torch.nn.Identity()
        )
        self._embedder = (embedder,)  # in a tuple, so that torch does not take it for a part of this model
        self._options = (options, tokens)
        self._template = template
        self._second_template = pair_template(generator.template, SWAPPED, control) if self.framing.swapped else ""
        self._rendered = rendered
        self.health: Health | None = None
        self._warned = False
        self._scorer: QueryScorer | None = None
        self._answers = Answers(self._options[0])
        if embedder.max_seq_length is not None:
            self.max_seq_length = embedder.max_seq_length
        self.eval()

    def predict(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Score pairs as `CrossEncoder.predict` does; a warning says if the model does not answer the question.

        Args:
            inputs: One pair or a list of pairs.
            args: Further arguments of `CrossEncoder.predict`.
            kwargs: Further arguments of `CrossEncoder.predict`.

        Returns:
            (n,) float32; other forms as in sentence-transformers.

        Raises:
            Gen2EmbedError: A pair cannot be made to fit into `max_seq_length`, or has an image for a model of text
                alone; with `likelihood`, a candidate that is not a text.
            TypeError: An input is not a pair.
        """
        self._answers = Answers(self._options[0])
        scores = super().predict(inputs, *args, **kwargs)
        self._judge()
        return scores

    def rank(  # noqa: PLR0917 # as in sentence-transformers
        self,
        query: Any,
        documents: Sequence[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Any = None,
        device: Any = None,
        **kwargs: Any,
    ) -> list[dict[Any, Any]]:
        """Sort candidates of a query as `CrossEncoder.rank` does, with the query's part computed once.

        Args:
            query: What `encode_query` takes.
            documents: The candidates.
            top_k: How many are returned; `None` returns all.
            return_documents: Whether each candidate itself is returned, as "text".
            prompt_name: The name of a system prompt in `prompts`.
            prompt: A system prompt.
            batch_size: Ignored, but where `device` is given: batches are cut by tokens.
            show_progress_bar: Ignored, but where `device` is given.
            activation_fn: What is applied to the scores; `None`: nothing.
            device: One or several devices; the pairs then run in full, as in `predict`.
            kwargs: Further arguments of `CrossEncoder.rank`; the pairs then run in full.

        Returns:
            One dict per candidate, "corpus_id" and "score", the best first; equal scores keep the order of `documents`.

        Raises:
            Gen2EmbedError: As in `predict`.
        """
        if device is not None or kwargs or not len(documents):
            more = {"activation_fn": activation_fn, "device": device, **kwargs}
            options = {"prompt_name": prompt_name, "prompt": prompt, "batch_size": batch_size, **more}
            return super().rank(
                query, documents, top_k, return_documents, show_progress_bar=show_progress_bar, **options
            )
        found = self.query_scorer.score(query, documents, self._resolve_prompt(prompt, prompt_name))
        self._answers = Answers(self._options[0])
        self._answers.add(torch.from_numpy(found.options).flatten(0, 1))
        self._judge()
        scores = torch.from_numpy(found.scores)[:, None]
        listed = (activation_fn or self.activation_fn)(scores)[:, 0].tolist()
        order = sorted(range(len(listed)), key=lambda number: -listed[number])[:top_k]
        texts = [{"text": documents[number]} if return_documents else {} for number in order]
        return [
            {"corpus_id": number, "score": listed[number], **text} for number, text in zip(order, texts, strict=True)
        ]

    @property
    def query_scorer(self) -> QueryScorer:
        """What scores the candidates of one query with the query's part computed once."""
        from gen2embed_mteb.embedder.reranking.query_scorer import QueryScorer

        if self._scorer is None:
            self._scorer = QueryScorer(self)
        return self._scorer

    def _judge(self) -> None:
        """Note the health of the last answers; warn if the model does not answer."""
        self.health = self._answers.health
        if self.health is not None and self.health.warning and not self._warned:
            logger.warning("%s, framing %s: %s", self._of.source, self.framing.name, self.health.warning)
            self._warned = True  # `rank` is called once per query

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """Turn pairs into features: open them, cut the longer text of pairs that are too long, render, tokenize.

        Args:
            inputs: Pairs.
            prompt: A system prompt; a task can be told here.
            kwargs: Further arguments of `CrossEncoder.preprocess`.
        """
        if len(inputs) == 0:
            return {}
        pairs = [self._pair(one) for one in inputs]
        kwargs["processing_kwargs"] = _untruncated(kwargs.get("processing_kwargs"))
        if self.framing.name == "likelihood":
            return self._likelihood_features(pairs, prompt, **kwargs)
        _, (features, *more) = self._asked(pairs, prompt, **kwargs)
        return {**features, _SECOND: more[0]} if more else features

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the modules, and for a second question run them again; "scores" is (n, 1).

        Args:
            input: What `preprocess` returns.
            kwargs: Arguments for the modules.
        """
        second, answers = input.pop(_SECOND, None), input.pop(_ANSWERS, None)
        if answers is not None:
            given, empty = (
                log_probabilities(self[0](batch_to_device(one, self.device))["causal_logits"], answers)
                for one in (input, second)
            )
            return {"scores": (given - empty)[:, None]}
        output: dict[str, Any] = super().forward(input, **kwargs)
        tokens = self._options[1]
        chosen = [option_probabilities(output["causal_logits"][:, -1], tokens)]
        if second is not None:
            swapped = super().forward(batch_to_device(second, self.device), **kwargs)
            chosen.append(option_probabilities(swapped["causal_logits"][:, -1], tokens))
            # In the second question the same two letters stand for the opposite.
            output["scores"] = (output["scores"].float() - swapped["scores"].float()) / 2
        output[OPTIONS] = torch.stack(chosen, dim=1)
        self._answers.add(output[OPTIONS].flatten(0, 1))
        return output

    def save(
        self,
        path: str | None,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: list[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write stock modules only, adapters merged, so that plain `CrossEncoder` loads the directory.

        Args:
            path: The directory; files that an earlier call wrote there are replaced.
            model_name: The name in the model card.
            create_model_card: Whether `README.md` is written.
            train_datasets: Ignored, as in sentence-transformers.
            safe_serialization: Must be true: pickled weights are not written.

        Raises:
            ForeignFileError: A file that this method did not save stands at a path that must be written.
            Gen2EmbedError: Stock modules cannot express the framing or a setting of the embedder, the adapter cannot be
                merged, or the written files do not load as this model.
        """
        if path is None:
            return
        if not safe_serialization:
            raise Gen2EmbedError("safe_serialization=False would write pickled weights; leave it out")
        stock_framing(self.framing.name)
        reason = self._of.inexpressible
        if reason:
            raise Gen2EmbedError(
                f"{reason} cannot be saved: no stock module can express it; save the reranker of a model that was "
                "loaded without it"
            )
        prepare_tokenizer(self.tokenizer)

        def write(folder: str) -> None:
            CrossEncoder.save(self, folder, model_name=model_name, create_model_card=create_model_card)

        with generator_parts(self._of[0].model):  # those that a readout leaves out
            saving.save_merged(self, path, write, kind=generation_class(self[0].config)[1])

    @property
    def _of(self) -> Any:
        return self._embedder[0]

    def _pair(self, given: Any) -> Pair:
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise TypeError(f"a pair is (query, candidate), got {described(given)}")
        query, candidate = map(self._of._content, given)
        if self.framing.name == "likelihood" and (candidate.images or not candidate.text.strip()):
            raise Gen2EmbedError(
                "framing='likelihood' scores the text of a candidate, and this one has "
                f"{'an image' if candidate.images else 'no text'}; choose mcq"
            )
        return Pair(query, candidate)

    def _rendered_features(self, pairs: Sequence[Pair], prompt: str | None, **kwargs: Any) -> dict[str, Any]:
        kwargs.setdefault("processing_kwargs", _untruncated(None))
        features: dict[str, Any] = super().preprocess([pair.as_messages() for pair in pairs], prompt, **kwargs)
        if self._of.layout != "native" and "mm_token_type_ids" in features:
            # Image tokens count as text, which gives every token its plain 1-D position.
            features["mm_token_type_ids"] = torch.zeros_like(features["mm_token_type_ids"])
        return features

    def _asked(
        self, pairs: list[Pair], prompt: str | None = None, **kwargs: Any
    ) -> tuple[list[Pair], list[dict[str, Any]]]:
        """Return pairs that fit into `max_seq_length`, and the features of each question about them."""
        pairs, features = self._fitted(pairs, self.max_seq_length or NO_LIMIT, prompt, **kwargs)
        found = [features]
        if self._second_template:
            set_template(self[0].processor, self._second_template)
            try:
                found.append(self._rendered_features(pairs, prompt, **kwargs))
            finally:
                set_template(self[0].processor, self._template)
        return pairs, found

    def _fitted(
        self, pairs: list[Pair], limit: int, prompt: str | None, **kwargs: Any
    ) -> tuple[list[Pair], dict[str, Any]]:
        """Return pairs that fit into a number of tokens, and their features."""
        features = self._rendered_features(pairs, prompt, **kwargs)
        while True:
            lengths = features["attention_mask"].sum(dim=1).tolist()
            if max(lengths) <= limit:
                return pairs, features
            pairs = [
                shortened(pair, length - limit, self.tokenizer) if length > limit else pair
                for pair, length in zip(pairs, lengths, strict=True)
            ]
            features = self._rendered_features(pairs, prompt, **kwargs)

    def _likelihood_features(self, pairs: list[Pair], prompt: str | None, **kwargs: Any) -> dict[str, Any]:
        answers = [self._answer(pair) for pair in pairs]
        asked = [Pair(pair.query, None) for pair in pairs]
        _, given = self._fitted(asked, self._limit_beside(answers), prompt, **kwargs)
        empty = self._rendered_features([Pair(Content(""), None)] * len(pairs), prompt, **kwargs)
        pad = self.tokenizer.pad_token_id
        return {
            **with_answers(given, answers, pad),
            _SECOND: with_answers(empty, answers, pad),
            _ANSWERS: answers,
        }

    def _answer(self, pair: Pair) -> list[int]:
        """Return the tokens of a candidate's text behind the opened turn of the assistant."""
        return answer_tokens(self.tokenizer, self._rendered, pair.candidate.text if pair.candidate else "")

    def _limit_beside(self, answers: Sequence[Sequence[int]]) -> int:
        """Return the most tokens of a prompt that leave room for the longest answer."""
        limit, longest = self.max_seq_length or NO_LIMIT, max(map(len, answers))
        if longest >= limit:
            raise Gen2EmbedError(f"a candidate has {longest} tokens, max_seq_length is {limit}; shorten the candidate")
        return limit - longest

    @staticmethod
    def _input_length(sample: Any) -> int:
        """Return roughly the number of tokens of a pair, the key by which sentence-transformers sorts."""
        return sum(rough_length(one) for one in sample) if isinstance(sample, (list, tuple)) else rough_length(sample)


def _untruncated(options: Any) -> dict[str, Any]:
    """Return options of the processor with which it does not truncate: the question would be lost."""
    given = {key: dict(value) for key, value in (options or {}).items()}
    text = {key: value for key, value in given.get("text", {}).items() if key != "max_length"}
    return {**given, "text": {**text, "truncation": False}}
