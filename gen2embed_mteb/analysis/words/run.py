"""Asks the output layer for the most probable next tokens at the embedding's position, prompt by prompt.

The embedding is the last hidden state of the prompted input. The generator of the same weights turns that state into
the probabilities of the next token: of the "one word" that the prompt asks for. A readout other than the last state is
left out of this, since the output layer was made for the last one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gen2embed_mteb.analysis.inputs import AskedInput, OpenedData, open_data, opened_rows, own_input
from gen2embed_mteb.analysis.options import WordsOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RowError, refuse_images
from gen2embed_mteb.evaluation.tables import Table, as_text
from gen2embed_mteb.mmeb.evaluate import images_in
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


class NextToken(NamedTuple):
    """A token that may come next, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class WordsResult:
    """The tokens of every input under every prompt.

    Attributes:
        model: The model's name.
        prompts: The names of the prompts.
        inputs: The inputs.
        tokens: For each input and prompt, the most probable tokens first.
        errors: Rows that were set aside.
    """

    model: str
    prompts: tuple[str, ...]
    inputs: tuple[AskedInput, ...]
    tokens: tuple[tuple[tuple[NextToken, ...], ...], ...]
    errors: tuple[RowError, ...] = ()


def open_words(options: WordsOptions) -> OpenedData | AskedInput:
    """Open the datasets, or the input of the caller.

    Args:
        options: Which inputs.

    Raises:
        Gen2EmbedError: Data or the image cannot be used.
    """
    if options.text or options.image:
        return AskedInput("", "query", own_input(options.text, options.image))
    return open_data(replace(options, subsets=options.names))


def analyze_words(model: Gen2Embed, options: WordsOptions, data: OpenedData | AskedInput) -> WordsResult:
    """Return the most probable next tokens; the model has the last of the prompts afterwards.

    Args:
        model: The model.
        options: Which inputs, prompts and how many tokens.
        data: What `open_words` returned.

    Raises:
        Gen2EmbedError: The model has no output layer, takes text alone where there are images, or no row can be used.
    """
    errors: list[RowError] = []
    if isinstance(data, OpenedData):
        refuse_images(model.text_alone, images_in(data.tables, options.limit, options))
        inputs = [one for pair in opened_rows(data, options, errors) for one in pair]
    else:
        inputs = [data]
    if not inputs:
        raise Gen2EmbedError(f"no row can be used; the first reason: {errors[0].reason}")
    columns, names = [], []
    for name in options.prompts:
        model.set_prompt(name)
        names.append(model.prompt_mode)
        columns.append([next_tokens(model, one.given, one.side, options.top) for one in inputs])
    return WordsResult(model.source, tuple(names), tuple(inputs), tuple(zip(*columns, strict=True)), tuple(errors))


def next_tokens(model: Gen2Embed, given: dict[str, Any], side: Side, top: int) -> tuple[NextToken, ...]:
    """Return the most probable next tokens behind one prompted input.

    Args:
        model: The model.
        given: The input.
        side: Its side.
        top: How many tokens.

    Raises:
        Gen2EmbedError: The model has no output layer.
    """
    generator = model.generator
    features = model.preprocess([given], task=side)
    taken = generator.module.model_forward_params
    moved = {
        name: value.to(model.device)
        for name, value in features.items()
        if isinstance(value, torch.Tensor) and (taken is None or name in taken) and name not in _NOT_PASSED
    }
    with torch.inference_mode():  # not above: an output layer that is read there could never be trained
        logits = generator.model(**moved, logits_to_keep=1).logits[0, -1]
    found = logits.float().softmax(dim=-1).topk(min(top, logits.shape[-1]))
    tokens = (model.tokenizer.decode([token]) for token in found.indices.tolist())
    return tuple(NextToken(text, value) for text, value in zip(tokens, found.values.tolist(), strict=True))


_NOT_PASSED = frozenset({"modality", "logits_to_keep", "num_images_per_sample", "num_videos_per_sample"})
"""What sentence-transformers puts beside the features, for itself."""


def shown(text: str) -> str:
    """Return a token as people read it: its blanks and line breaks can be seen."""
    return text.replace(" ", "·").replace("\n", "\\n").replace("\t", "\\t") or "(nothing)"


def text_table(result: WordsResult) -> str:
    """Return the tokens of every input as a text."""
    rows: Table = [["input", "side", *result.prompts]]
    for one, columns in zip(result.inputs, result.tokens, strict=True):
        cells = [", ".join(f"{shown(token.text)} {token.probability:.2f}" for token in tokens) for tokens in columns]
        text = one.text if len(one.text) <= 40 else f"{one.text[:39]}…"
        what = " ".join(filter(None, (one.label, "[image]" if "image" in one.given else "", " ".join(text.split()))))
        rows.append([what, one.side, *cells])
    return as_text(rows)


def as_json(result: WordsResult) -> dict[str, Any]:
    """Return the tokens for `words.json`."""
    return {
        "model": result.model,
        "inputs": [
            {
                "input": one.label,
                "side": one.side,
                "text": one.text,
                "has_image": "image" in one.given,
                "prompts": {
                    prompt: [token._asdict() for token in tokens]
                    for prompt, tokens in zip(result.prompts, columns, strict=True)
                },
            }
            for one, columns in zip(result.inputs, result.tokens, strict=True)
        ],
        "errors": [error._asdict() for error in result.errors],
    }
