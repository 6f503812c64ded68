"""The chat format of a loaded processor or tokenizer: what only it can tell, after its template was tried.

Users may write a model's own control tokens and placeholders of images. They must not act as such. Three ways are tried
on a text that holds them all, with and without an image, and the first is taken that leaves the control tokens of the
prompt as they are:

1. transformers reads control tokens in the conversation as plain text (`sanitize_control_tokens`);
2. it does so, and the header puts a space into placeholders ("< image>");
3. the header puts a space into every control token.

Cost: up to twelve calls of the processor, with an image of 56x56 pixels in half of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from PIL import Image

from gen2embed_mteb.embedder.chat_formats.chat_format import ChatFormat
from gen2embed_mteb.embedder.chat_formats.detection import Detected, detect, render
from gen2embed_mteb.embedder.chat_formats.header import own_template, parts_of, template_with_prompt
from gen2embed_mteb.embedder.chat_formats.rules import NO_PROMPT, PROMPT, TEXT
from gen2embed_mteb.errors import Gen2EmbedError, one_line

_MARKS = tuple(f"<|image_{number}|>" for number in range(1, 10))
_OF_TEXT = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))
"""The names of the tokens that stand for no image, video or sound."""
_MOST_TRIED = 64
"""How many control tokens the text of the trial holds at most; some tokenizers have thousands of unused ones."""


def takes_images(processor: Any) -> bool:
    """Return whether a processor takes images; a tokenizer alone does not."""
    return getattr(processor, "image_processor", None) is not None


def template_of(processor: Any) -> str:
    """Return the chat template of a processor, or else that of its tokenizer.

    Raises:
        Gen2EmbedError: There is none.
    """
    named: list[str] = []
    for one in (processor, getattr(processor, "tokenizer", None)):
        template = getattr(one, "chat_template", None)
        if isinstance(template, dict):
            named += map(str, template)
            template = template.get("default")
        if isinstance(template, str) and template.strip():
            return template
    name = getattr(processor, "name_or_path", "") or type(processor).__name__
    if named:
        raise Gen2EmbedError(
            f"{name} has chat templates named {', '.join(sorted(named))}, but none named default: pass one of them as "
            "a text: processor_kwargs={'chat_template': …}"
        )
    raise Gen2EmbedError(
        f"{name} has no chat template, so that no prompt can be given to it: take an instruction-tuned version of the "
        "model, or pass a template of your own: processor_kwargs={'chat_template': …}"
    )


def chat_format_of(processor: Any) -> Detected:
    """Return the chat format of a model; one that was exported before is read back, not probed.

    Args:
        processor: The model's processor, or its tokenizer if it takes text alone.

    Raises:
        Gen2EmbedError: There is no chat template, no format fits it, or the processor does not take what it renders.
    """
    template = template_of(processor)
    known = parts_of(template)
    if known is not None:
        return Detected(known.chat_format, ("The format was read from the exported template.",))
    tokenizer = getattr(processor, "tokenizer", processor)
    images = takes_images(processor)
    detected = detect(
        template, dict(tokenizer.special_tokens_map), images=images, image=_image_text(processor) if images else ""
    )
    chat_format, reasons = detected
    if _lacks_bos(tokenizer, template, chat_format):
        chat_format = replace(chat_format, write_bos=True)
        reasons += (f"{tokenizer.bos_token!r} is written first: the tokenizer would add it, the template does not.",)
    placeholders = _placeholders(processor)
    all_tokens = control_tokens(processor)
    ways = (
        (replace(chat_format, sanitize=True), "transformers reads control tokens in a text as plain text."),
        (
            replace(chat_format, sanitize=True, broken_up=placeholders),
            "transformers reads control tokens in a text as plain text; a space is put into placeholders.",
        ),
        (replace(chat_format, sanitize=False, broken_up=all_tokens), "A space is put into control tokens in a text."),
    )
    faults: list[tuple[str, str]] = []
    for way, reason in ways:
        fault = _fault(processor, template, way, images, all_tokens)
        if fault is None:
            return Detected(way, (*reasons, *(f"Not: {reason} ({fault})" for reason, fault in faults), reason))
        faults.append((reason, fault))
    raise Gen2EmbedError(
        f"{type(processor).__name__} does not take the prompt that its chat template renders: {faults[-1][1]}. "
        "Such a model cannot be used here"
    )


def try_template(template: str, tokenizer: Any) -> None:
    """Render a text once in a template that was exported: its folder may have been changed since.

    Args:
        template: A template with a prompt.
        tokenizer: The tokenizer, whose special tokens the template can read.

    Raises:
        Gen2EmbedError: The template raises, or runs or writes more than is allowed (see `limits`).
    """
    try:
        render(template, TEXT.messages, "query", tokenizer.special_tokens_map)
    except Gen2EmbedError:
        raise
    except Exception as error:  # whatever it raises follows from the template
        raise Gen2EmbedError(
            f"the exported chat template raises {type(error).__name__}: {one_line(error)[:200]}; export the model again"
        ) from error


def control_tokens(processor: Any) -> tuple[str, ...]:
    """Return all tokens that must not act where a user writes them: placeholders first, then the tokenizer's own.

    Args:
        processor: The model's processor, or its tokenizer if it takes text alone.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    return tuple(dict.fromkeys([*_placeholders(processor), *_control_tokens(tokenizer)]))


def _image_text(processor: Any) -> str:
    for name in ("boi_token", "image_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token:
            return token
    return ""


def _lacks_bos(tokenizer: Any, template: str, chat_format: ChatFormat) -> bool:
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or list(tokenizer("a")["input_ids"])[:1] != [bos_id]:
        return False
    prompted = template_with_prompt(own_template(template), PROMPT, chat_format)
    return not render(prompted, TEXT.messages, "query", tokenizer.special_tokens_map).startswith(bos)


def _placeholders(processor: Any) -> tuple[str, ...]:
    """Return the placeholders of images, videos and sounds that the processor replaces, the longest first."""
    if not takes_images(processor):
        return ()
    named = {**vars(processor), **processor.tokenizer.special_tokens_map}
    found = {str(value) for name, value in named.items() if name.endswith("_token") and name not in _OF_TEXT and value}
    tokens = processor.tokenizer.added_tokens_encoder  # what is no token of its own may be an ordinary word
    kept = {token for token in found if len(token) > 1 and token in tokens and token not in _MARKS}
    return tuple(sorted(kept, key=lambda token: (-len(token), token)))


def _control_tokens(tokenizer: Any) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = dict.fromkeys([*tokenizer.all_special_tokens, *added])
    kept = [token for token in tokens if len(token) > 1 and token not in _MARKS and not token.isspace()]
    return sorted(kept, key=len, reverse=True)


def _fault(processor: Any, template: str, chat_format: ChatFormat, images: bool, tokens: tuple[str, ...]) -> str | None:
    """Return why a chat format does not keep control tokens in a text from acting; `None` if it does."""
    tokenizer = getattr(processor, "tokenizer", processor)
    used = [token for token in tokens if token in template or token in tokenizer.all_special_tokens]
    hostile = "a ".join(dict.fromkeys([*_placeholders(processor), *used, *tokens][:_MOST_TRIED]))
    prompted = template_with_prompt(template, NO_PROMPT, chat_format)
    control = {*tokenizer.convert_tokens_to_ids(list(tokens))}
    for pictures in (0, 1) if images else (0,):
        counts = []
        for text in ("a", f"a {hostile} a"):
            try:
                ids = _token_ids(processor, prompted, chat_format, text, pictures)
            except Exception as error:  # whatever the processor raises
                return f"{type(error).__name__}: {one_line(error)[:200]}"
            counts.append(Counter(token for token in ids if token in control))
            if text == "a" and ids[-1] != _rendered_ids(tokenizer, prompted)[-1]:
                return f"the processor writes {tokenizer.decode(ids[-1:])!r} behind the prompt"
        if counts[0] != counts[1]:
            differing = next(token for token in control if counts[0][token] != counts[1][token])
            return f"{tokenizer.decode([differing])!r} in a text acts as a control token"
    return None


def _token_ids(processor: Any, template: str, chat_format: ChatFormat, text: str, pictures: int) -> list[int]:
    """Return the tokens of one conversation, as sentence-transformers asks the processor for them."""
    image = Image.new("RGB", (56, 56), "gray")
    parts: list[dict[str, Any]] = [{"type": "image", "image": image}] * pictures + [{"type": "text", "text": text}]
    features = processor.apply_chat_template(
        [[{"role": "user", "content": parts}]],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **chat_format.processing_kwargs["chat_template"],
    )
    return [int(token) for token in features["input_ids"][0]]


def _rendered_ids(tokenizer: Any, template: str) -> list[int]:
    rendered = render(template, TEXT.messages, None, tokenizer.special_tokens_map)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
