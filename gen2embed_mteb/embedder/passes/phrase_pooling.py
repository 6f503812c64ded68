"""The mean over the tokens of a phrase with which the assistant turn begins (the strategy `lens`).

The phrase is the end of what the model reads, so that its tokens are the last ones of every input. How many they are
is found by tokenizing one rendered text: every token counts that reaches into the phrase. No stock module of
sentence-transformers averages these tokens alone, so that this pooling exists only while a model is loaded; it is not
saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.embedder.readouts.readout import readout_of
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import POOLINGS

PHRASE_LENGTH = "phrase_length"
"""The name under which `preprocess` puts the number of the phrase's tokens beside the features: (n,) int64."""


def check_pooling_mode(pooling: str, prompt: HierarchicalPrompt | None) -> None:
    """Refuse a pooling that is unknown, or that needs a phrase which the prompt does not have.

    Args:
        pooling: What the caller asks for.
        prompt: The prompt; `None` if it is not known yet.

    Raises:
        Gen2EmbedError: The message names the remedy.
    """
    if pooling not in POOLINGS:
        raise Gen2EmbedError(f"unknown pooling {pooling!r}; known: {', '.join(POOLINGS)}")
    if pooling == "phrase" and prompt is not None and not (prompt.query_phrase and prompt.document_phrase):
        raise Gen2EmbedError(
            f"pooling='phrase' averages the tokens of the prompt's phrase, and prompt_mode {prompt.name!r} has none on "
            "both sides; pass prompt_mode='lens', or leave pooling out"
        )


def state_name(model: Any) -> str:
    """Return which states of a `Gen2Embed` become the embedding, for records and reports: readout, and pooling."""
    name = readout_of(model[0].model).name
    return name if model.pooling == "last" else f"{name}, {model.pooling} mean"


def phrase_tokens(tokenizer: Any, rendered: str, phrase: str) -> list[int]:
    """Return the tokens of a phrase at the end of a rendered text; one that also has characters before it counts.

    Args:
        tokenizer: The model's tokenizer.
        rendered: A rendered conversation.
        phrase: The phrase.

    Raises:
        Gen2EmbedError: The text does not end in the phrase.
    """
    if not phrase or not rendered.endswith(phrase):
        raise Gen2EmbedError(
            f"pooling='phrase': what the model reads ends in {rendered[-40:]!r}, not in the phrase {phrase!r}; "
            "leave pooling out"
        )
    start = len(rendered) - len(phrase)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        int(token)
        for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if end > start
    ]


def check_ends(input_ids: torch.Tensor, mask: torch.Tensor, phrases: Sequence[Sequence[int]]) -> None:
    """Check that every row ends in the tokens of its phrase.

    Args:
        input_ids: (n, length) int64, padded on either side.
        mask: (n, length), 1 for tokens and 0 for padding.
        phrases: The tokens of each row's phrase.

    Raises:
        Gen2EmbedError: A row does not.
    """
    for row, kept, phrase in zip(input_ids, mask.bool(), phrases, strict=True):
        if row[kept][-len(phrase) :].tolist() != list(phrase):
            raise Gen2EmbedError(
                "pooling='phrase': an input does not end in the tokens of the phrase; the phrase must not contain "
                "control tokens. Leave pooling out, or change the phrase"
            )


def mean_of_last(states: torch.Tensor, last: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the mean of each row's last states, computed in float32.

    Args:
        states: (n, length, d), in any floating type.
        last: (n,) int64, the index of each row's last token.
        counts: (n,) int64, how many states are averaged, at least one.

    Returns:
        (n, d), in the type of `states`.
    """
    steps = torch.arange(int(counts.max()), device=states.device)
    columns = (last[:, None] - steps).clamp(min=0)
    taken = states[torch.arange(len(states), device=states.device)[:, None], columns].float()
    # What is not averaged may be padding, whose states may be anything.
    taken = taken.masked_fill((steps >= counts[:, None])[..., None], 0.0)
    return (taken.sum(dim=1) / counts[:, None]).to(states.dtype)


def pool_phrase(features: dict[str, Any], counts: torch.Tensor) -> dict[str, Any]:
    """Put the mean over the phrase's tokens into the output of a `Transformer`, as the pooling module would.

    Args:
        features: `token_embeddings` (n, length, d) and `attention_mask` (n, length).
        counts: (n,) int64, the number of the phrase's tokens in each row.

    Returns:
        The features with `sentence_embedding` (n, d).
    """
    mask = features["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    states = features["token_embeddings"]
    features["sentence_embedding"] = mean_of_last(states, last.to(states.device), counts.to(states.device))
    return features
