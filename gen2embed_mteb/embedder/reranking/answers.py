"""The tokens of answers: which token a model writes first when it begins its turn with a given word."""

from __future__ import annotations

from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError


def answer_text(tokenizer: Any, rendered: str, answer: str) -> str:
    """Return an answer as it stands behind the opened turn of the assistant.

    Templates that end in a word or a bracket ("ASSISTANT:", "[/INST]") are followed by a blank; those that end in a
    line break or in a control token are not.

    Args:
        tokenizer: The tokenizer.
        rendered: The conversation, up to the opened turn.
        answer: The answer.
    """
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain = rendered[-1:].isspace() or rendered.endswith(tuple(control))
    return answer if plain or answer[:1].isspace() else f" {answer}"


def answer_tokens(tokenizer: Any, rendered: str, answer: str) -> list[int]:
    """Return the tokens of an answer behind the opened turn of the assistant.

    Args:
        tokenizer: The tokenizer.
        rendered: The conversation, up to the opened turn.
        answer: The answer.
    """
    text = answer_text(tokenizer, rendered, answer)
    before = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    whole = tokenizer(rendered + text, add_special_tokens=False)["input_ids"]
    if whole[: len(before)] == before:
        return [int(token) for token in whole[len(before) :]]
    # The last token of the prompt and the answer would merge; the model reads the prompt alone.
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def option_tokens(tokenizer: Any, rendered: str, options: tuple[str, str]) -> tuple[int, int]:
    """Return the first token of each of two options.

    Raises:
        Gen2EmbedError: They begin with the same token, so that their logits cannot be told apart.
    """
    for given in (rendered, rendered + "\n"):  # as the template ends, or else without a blank before the answer
        first, second = (answer_tokens(tokenizer, given, option)[:1] for option in options)
        if first and second and first != second:
            return first[0], second[0]
    raise Gen2EmbedError(
        f"{tokenizer.name_or_path}: the tokenizer begins the answers {options[0]!r} and {options[1]!r} with the same "
        "token; choose another framing"
    )
