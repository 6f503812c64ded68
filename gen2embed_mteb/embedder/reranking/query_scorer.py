"""Scores of the candidates of one query, with the query's part computed once.

Everything that the k questions about one query begin with (the system turn, the query and its images, the words before
the candidate) runs once; the keys and values that the layers keep of it serve all k candidates. With `likelihood` that
is the whole prompt, and only the candidates' own tokens run k times.

1. One pair is rendered, tokenized and laid out in full: the query with a short text as its candidate.
2. Where all candidates are texts, each question is tokenized without images; what stands behind the tokens that all of
   them share is the part that runs per candidate. Pictures of the query are thus prepared once, too.
3. Where candidates have images, all pairs are prepared in full, and a second time without the query's images, for the
   features of the candidates' images alone.

The scores are those of `Reranker.predict` up to rounding (1e-5 in float32 is tested). A query that must be cut, and a
model whose scores differ (checked on a few pairs, for families that were not written by hand), runs in full.

Cost: one pass over the query's part, and one over the rest of each candidate. Equal texts are scored once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sentence_transformers.util import batch_to_device

from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.passes.shared_beginning import (
    Rows,
    SharedBeginning,
    laid_out,
    reuse_possible,
    split_features,
    taken_by,
)
from gen2embed_mteb.embedder.preparation.inputs import Content, rough_length
from gen2embed_mteb.embedder.reranking.behind_beginning import Behind, in_batches, in_order
from gen2embed_mteb.embedder.reranking.health import OPTIONS
from gen2embed_mteb.embedder.reranking.pairs import Pair

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE = 0.5
"""The largest difference of two scores that counts as rounding, by the type of the weights; else `_COARSE`."""
_AROUND = 64  # tokens of a question, roughly
_MOST_READ = 2048
"""The most tokens per call whose logits are read: each has one number per word of the vocabulary."""


@dataclass(frozen=True)
class PairScores:
    """The scores of the k candidates of a query.

    Attributes:
        scores: (k,) float32, as of `Reranker.predict`.
        options: (k, questions, 2) float32, the probabilities of the two options; (k, 0, 2) with `likelihood`.
        num_tokens: How many tokens went through the model.
        num_tokens_in_full: How many would have, without the query's part being shared.
    """

    scores: npt.NDArray[np.float32]
    options: npt.NDArray[np.float32]
    num_tokens: int
    num_tokens_in_full: int


class QueryScorer:
    """Scores the candidates of one query at a time; the model must not change while this object is in use.

    Args:
        reranker: A `Reranker`.
        batch_tokens: The most tokens per call of the model, about; `None`: 1024 on a CPU, 8192 on a GPU.
        reuse_query: `False` runs every pair in full.
    """

    def __init__(self, reranker: Any, *, batch_tokens: int | None = None, reuse_query: bool = True) -> None:
        """Keep the reranker; a check of its family runs when the first query is scored."""
        self.reranker = reranker
        self._module = reranker[0]
        self._embedder = reranker._of
        self._batch_tokens = batch_tokens or (1024 if reranker.device.type == "cpu" else 8192)
        self._reuse = reuse_query and reuse_possible(self._module.model.config)
        if reuse_query and not self._reuse:
            self._say("the model cannot go on from a cache")
        self._checked = not family_of(self._module.config.model_type).is_generic
        self._templates = [one for one in (reranker._template, reranker._second_template) if one]
        self._option_tokens = reranker._options[1]
        self._empty: dict[str | None, tuple[Rows, SharedBeginning]] = {}

    @property
    def reuses_query(self) -> bool:
        """Whether the query's part is computed once; `False` also if a check found that it cannot be reused."""
        if not self._checked:
            self._check()
        return self._reuse

    @torch.inference_mode()
    def score(self, query: Any, candidates: Sequence[Any], prompt: str | None = None) -> PairScores:
        """Score the candidates of a query.

        Args:
            query: What `encode_query` takes.
            candidates: k of the same, at least one; texts alone with `likelihood`.
            prompt: A system prompt; a task can be told here.

        Raises:
            Gen2EmbedError: A pair cannot be used; see `Reranker.predict`.
            ImageError: An image cannot be opened.
        """
        opened: Content = self._embedder._content(query)
        if prompt:
            opened = replace(opened, system=prompt + (opened.system or ""))
        contents = [self._embedder._content(candidate) for candidate in candidates]
        distinct: dict[Any, Content] = {}
        keys = [(content.text, content.system, *map(id, content.images)) for content in contents]
        for key, content in zip(keys, contents, strict=True):
            distinct.setdefault(key, content)
        chosen = [self.reranker._pair((opened, content)) for content in distinct.values()]
        numbers = {key: number for number, key in enumerate(distinct)}
        places = [numbers[key] for key in keys]
        found = self._shared(chosen) if self.reuses_query else None
        found = found or self._in_full(chosen)
        return replace(found, scores=found.scores[places], options=found.options[places])

    def _shared(self, pairs: list[Pair]) -> PairScores | None:
        """Score pairs of one query; `None` if its part cannot be shared."""
        if self.reranker.framing.name == "likelihood":
            return self._likelihood(pairs)
        probe = Pair(pairs[0].query, Content("a"))
        fitted, (features, *_) = self.reranker._asked([probe])
        if fitted[0] is not probe:
            return None
        whole, bare = self._laid_out(features), self._tokens(probe, self._templates[0])
        if any(pair.candidate.images for pair in pairs if pair.candidate):
            return self._with_images(pairs, whole, bare)
        tokens = [self._tokens(pair, template) for template in self._templates for pair in pairs]
        shared = _num_common([bare, *tokens])
        tails = [one[shared:] for one in tokens]
        length = self._length_before(whole, bare, shared)
        limit = self.reranker.max_seq_length
        if length == 0 or (limit and max(map(len, tails)) + length > limit):
            return None
        beginning = self._beginning(whole, length)
        batches = in_batches([len(tail) for tail in tails], self._batch_tokens)
        parts = [self._behind(whole, beginning, tails, batch).options(self._option_tokens) for batch in batches]
        own = sum(map(len, tails))
        return self._of_questions(in_order(batches, parts), length + own, length * len(tails) + own)

    def _with_images(self, pairs: list[Pair], whole: Rows, bare: list[int]) -> PairScores | None:
        """Score pairs of which some candidate has images; `None` if the query's part cannot be shared."""
        beginning: SharedBeginning | None = None
        batches = self._batches(pairs)
        found: list[list[torch.Tensor]] = [[] for _ in self._templates]
        own = in_full = 0
        for batch in batches:
            some = [pairs[place] for place in batch]
            fitted, questions = self.reranker._asked(some)
            if any(now.query != pair.query for now, pair in zip(fitted, some, strict=True)):
                return None
            alone = None
            if with_images := bool(pairs[0].query.images):
                without = [Pair(replace(pair.query, images=()), pair.candidate) for pair in fitted]
                alone = [self._laid_out(one) for one in self.reranker._asked(without)[1]]
                bare_probe = Pair(without[0].query, Content("a"))
                of_images = int(whole.lengths[0]) - self._laid_out(self.reranker._asked([bare_probe])[1][0]).lengths[0]
            for number, features in enumerate(questions):
                rows = self._laid_out(features)
                most = int(rows.lengths.min()) - 1
                if beginning is None:
                    everything = self._beginning(whole, int(whole.lengths[0]))
                    shared = everything.num_shared(rows.input_ids, most)
                    behind = int(whole.lengths[0]) - shared
                    if shared == 0 or self._length_before(whole, bare, len(bare) - behind) != shared:
                        return None
                    beginning = self._beginning(whole, shared)
                shared = beginning.num_shared(rows.input_ids, most)
                if shared == 0 or (with_images and shared < len(beginning)):
                    return None  # an image may stand behind what this batch shares
                source = rows if alone is None else alone[number]
                if alone is not None and not (
                    bool((rows.lengths - source.lengths == of_images).all()) and _end_alike(rows, source, shared)
                ):
                    return None  # the images of a pair depend on each other (LLaVA-OneVision), or all stand in front
                images = split_features(source, self._takes)[1]
                laid = Behind.of_rows(rows, beginning, shared, images, self._takes)
                found[number].append(laid.options(self._option_tokens))
                tokens = int(rows.lengths.sum())
                own += tokens - shared * len(some)
                in_full += tokens
        logits = torch.cat([in_order(batches, parts) for parts in found])
        return self._of_questions(logits, own + len(beginning or ()), in_full)

    def _likelihood(self, pairs: list[Pair]) -> PairScores | None:
        """Score the texts of candidates; `None` if the prompt is a single token."""
        answers = [self.reranker._answer(pair) for pair in pairs]
        limit = self.reranker._limit_beside(answers)
        (asked,), features = self.reranker._fitted([Pair(pairs[0].query, None)], limit, None)
        row = self._laid_out(features)
        system = asked.query.system
        if system not in self._empty:
            nothing = self.reranker._rendered_features([Pair(Content("", system=system), None)], None)
            empty = self._laid_out(nothing)
            self._empty[system] = empty, self._beginning(empty, int(empty.lengths[0]) - 1)
        # The first token of an answer is told by the last token of the prompt, which therefore runs with each answer.
        length = int(row.lengths[0]) - 1
        sums, num_tokens, in_full = [], length, 0
        for prompt, beginning in ((row, self._beginning(row, length)), self._empty[system]):
            if len(beginning) == 0:
                return None
            last = prompt.input_ids[0, len(beginning) : len(beginning) + 1].tolist()
            tails = [last + answer for answer in answers]
            batches = in_batches([len(tail) for tail in tails], min(self._batch_tokens, _MOST_READ))
            parts = [self._behind(prompt, beginning, tails, batch).log_probabilities(1) for batch in batches]
            sums.append(in_order(batches, parts))
            own = sum(map(len, tails))
            num_tokens, in_full = num_tokens + own, in_full + own + len(beginning) * len(tails)
        scores = (sums[0] - sums[1]).numpy()
        return PairScores(scores, np.zeros((len(pairs), 0, 2), np.float32), num_tokens, in_full)

    def _in_full(self, pairs: list[Pair]) -> PairScores:
        """Score pairs by the plain forward pass."""
        batches = self._batches(pairs)
        scores, options, num_tokens = [], [], 0
        for batch in batches:
            features = self.reranker.preprocess([(pairs[number].query, pairs[number].candidate) for number in batch])
            for asked in (features, *(value for value in features.values() if isinstance(value, dict))):
                num_tokens += int(asked["attention_mask"].sum())
            output = self.reranker(batch_to_device(features, self.reranker.device))
            scores.append(output["scores"].float().flatten().cpu())
            options.append(output.get(OPTIONS, torch.zeros(len(batch), 0, 2)).float().cpu())
        found, chosen = in_order(batches, scores).numpy(), in_order(batches, options).numpy()
        return PairScores(found, chosen, num_tokens, num_tokens)

    def _batches(self, pairs: list[Pair]) -> list[list[int]]:
        """Return the numbers of pairs in batches of like lengths.

        Lengths are estimates: counting would take the embedder's tokenizer, which another thread may be using.
        """
        lengths = [_AROUND + rough_length(pair.query) + rough_length(pair.candidate) for pair in pairs]
        return in_batches(lengths, self._batch_tokens)

    def _of_questions(self, logits: torch.Tensor, num_tokens: int, in_full: int) -> PairScores:
        """Return the scores.

        Args:
            logits: (questions * k, 3), as of `Behind.options`, all pairs of the first question first.
            num_tokens: How many tokens went through the model.
            in_full: How many would have.
        """
        read = logits.reshape(len(self._templates), -1, 3)
        odds = read[..., 0] - read[..., 1]
        # In the second question the same two letters stand for the opposite.
        scores = odds[0] if len(odds) == 1 else (odds[0] - odds[1]) / 2
        options = (read[..., :2] - read[..., 2:]).exp().transpose(0, 1).contiguous()
        return PairScores(scores.numpy(), options.numpy(), num_tokens, in_full)

    def _length_before(self, whole: Rows, bare: list[int], shared: int) -> int:
        """Return how many tokens of a pair stand before those behind the first `shared` ones of its bare rendering.

        Args:
            whole: The pair, with all tokens of its images.
            bare: Its tokens with one mark for an image.
            shared: A number of them.

        Returns:
            The number; 0 if the tokens behind differ, so that an image may stand among them.
        """
        length = int(whole.lengths[0]) - (len(bare) - shared)
        same = shared > 0 and length > 0 and whole.input_ids[0, length:].tolist() == bare[shared:]
        return length if same else 0

    def _behind(self, row: Rows, beginning: SharedBeginning, tails: list[list[int]], batch: list[int]) -> Behind:
        return Behind.of_texts(row, beginning, [tails[number] for number in batch], self._takes)

    def _beginning(self, row: Rows, length: int) -> SharedBeginning:
        return SharedBeginning.of(self._module.model, row, length, self._takes, logits_to_keep=1)

    def _laid_out(self, features: dict[str, Any]) -> Rows:
        model = self._module.model
        return laid_out(features, getattr(model, model.base_model_prefix))

    def _takes(self, name: str) -> bool:
        return taken_by(self._module, name)

    def _tokens(self, pair: Pair, template: str) -> list[int]:
        """Return the tokens of a rendered question, with one mark for an image."""
        rendered = self._module.processor.apply_chat_template(
            pair.as_messages(), tokenize=False, add_generation_prompt=True, chat_template=template
        )
        found: list[int] = self._module.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return found

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare scores with and without the shared part; if they differ, every pair runs in full, with a warning."""
        self._checked = True
        if not self._reuse:
            return
        queries: list[Any] = ["a red circle", {"text": "What is the name of the place?"}]
        candidates: list[Any] = ["a", "the name of a place, said at more length"]
        if self._embedder.takes_images:
            noise = Image.effect_noise((64, 64), 80).convert("RGB")
            queries.append({"text": "What is it?", "image": noise})
            if self.reranker.framing.name != "likelihood":
                candidates.append({"text": "b", "image": noise.rotate(90)})
        limit = _TOLERANCE.get(self._embedder.dtype, _COARSE)
        for query in queries:
            for some in (candidates[:2], candidates):
                pairs = [self.reranker._pair((query, candidate)) for candidate in some]
                found = self._shared(pairs)
                if found is None:
                    continue
                difference = float(np.abs(found.scores - self._in_full(pairs).scores).max())
                if not difference <= limit:  # NaN is a failure, too
                    self._reuse = False
                    self._say(f"scores differ by {difference:.2g} if the query's part is shared")
                    return

    def _say(self, reason: str) -> None:
        logger.warning("%s: %s; every pair now runs in full", self._embedder.source, reason)


def _end_alike(rows: Rows, others: Rows, shared: int) -> bool:
    """Return whether each sequence without its first `shared` tokens is the end of the other sequence."""
    pairs = zip(rows.input_ids, others.input_ids, rows.lengths.tolist(), others.lengths.tolist(), strict=True)
    return all(
        length - shared <= other and torch.equal(row[shared:length], ids[other - length + shared : other])
        for row, ids, length, other in pairs
    )


def _num_common(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with; at least one token of each is left."""
    most = min(map(len, sequences)) - 1
    differ = (place for place in range(most) if len({sequence[place] for sequence in sequences}) > 1)
    return next(differ, most)
