"""Byte-level tokenizers for tiny models, trained on the prompt's texts when they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES, TASK_STRATEGIES

PAPER = [prompt for name, prompt in STRATEGIES.items() if name not in TASK_STRATEGIES]
"""The strategies on whose texts the tokenizers are trained."""
_WORDS = "a b c d user assistant system model User: Assistant: USER: ASSISTANT: \n \n\n You are a helpful assistant."
_LINES = (
    "a\n\n\n\nb\n\n\nc\n\n" * 20
)  # as in real vocabularies, line breaks merge, those of a prompt with those beside an image


def byte_level(specials: Sequence[str], named: Mapping[str, str], bos: str | None) -> Any:
    """Return a byte-level BPE tokenizer.

    Args:
        specials: All special tokens but the padding token and `bos`.
        named: Special tokens by the name that a processor asks for.
        bos: The token that is put in front of every text, if there is one.
    """
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    first = ["<pad>", *([bos] if bos else [])]
    texts = [text for prompt in PAPER for text in (prompt.query_system, prompt.query_text, _WORDS)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*first, *specials], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*texts, _LINES], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    plain = [token for token in specials if token not in named.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token=bos,
        eos_token="<|im_end|>" if "<|im_end|>" in specials else None,
        additional_special_tokens=plain,
        extra_special_tokens=dict(named),
    )
    tokenizer.model_max_length = 4096
    return tokenizer
