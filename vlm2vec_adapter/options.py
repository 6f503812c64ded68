"""Our own options: `--gen2embed_*` flags or environment variables, which are read and removed before VLM2Vec parses."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from gen2embed_mteb.config import LAYOUTS
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option, switch_value, value_type
from gen2embed_mteb.images.resizing import ImageOptions
from vlm2vec_adapter import BACKBONE

PREFIX = "gen2embed_"

RELEASED = re.compile(r"SaHa-Qwen2-VL-\d+B-Instruct")
"""The names of the checkpoints released with the paper, on the hub, in its cache and in most copies."""


class UsageError(Gen2EmbedError):
    """The error for a command line that cannot be used; the message names the flag and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """Settings of vectors besides VLM2Vec's own flags; each is `--gen2embed_NAME` or the variable `GEN2EMBED_NAME`.

    Raises:
        UsageError: A value is unknown or out of its range; the message names it and the remedy.
    """

    prompt_mode: str | None = option(
        "prompt strategy (default: hierarchical, or an exported model's own)", default=None
    )
    layout: str = option(
        "image layout; auto: official for the checkpoints released with the paper",
        default="auto",
        choices=("auto", *LAYOUTS),
    )
    adapter: str | None = option(
        "LoRA or DoRA adapter: directory or hub id (or --lora True --checkpoint_path)", default=None
    )
    batch_tokens: int | None = option(
        "tokens per call of the model, padding included (default: as suits the device)", default=None, least=1
    )
    num_crops: int | None = option(
        "most tiles of an image, for Phi-3.5-V (default: what the model's folder says, 4)", default=None, least=1
    )
    dtype: str | None = option("float32, bfloat16, float16 (default: what the checkpoint was saved in)", default=None)
    revision: str | None = option("revision of the model on the hub", default=None)

    def __post_init__(self) -> None:
        """Check every value, so that a run does not fail after the model was loaded."""
        from gen2embed_mteb.embedder.prompts.strategies import strategy

        if self.prompt_mode is not None:
            strategy(self.prompt_mode)
        check_options(self, UsageError, f"--{PREFIX}")

    def layout_for(self, *sources: str | None) -> str:
        """Return the image layout for a model: the requested one, or else the one that its name implies.

        Args:
            sources: Hub ids or paths of the model and its adapter.

        Returns:
            `native` or `official`.
        """
        if self.layout != "auto":
            return self.layout
        return "official" if any(RELEASED.search(source or "") for source in sources) else "native"


def take_options(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[Options, list[str]]:
    """Separate our options from VLM2Vec's.

    Args:
        arguments: The words after the script's path; `--flag value`, `--flag=value`, and `-` for `_` in our flags.
        environment: The environment, with variables such as `GEN2EMBED_PROMPT_MODE`; a flag takes precedence.

    Returns:
        Our options, and the remaining words in order.

    Raises:
        UsageError: A flag of ours does not exist, lacks its value, or has a value that cannot be used.
    """
    known = {option.name: option for option in fields(Options)}
    given = {name: environment[key] for name in known if environment.get(key := f"GEN2EMBED_{name.upper()}")}
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or not name.startswith(PREFIX):
            rest.append(word)
            continue
        name = name.removeprefix(PREFIX)
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean --{PREFIX}{close[0]}?" if close else ""
            raise UsageError(f"unknown option {flag}.{hint} Known: {', '.join(f'--{PREFIX}{name}' for name in known)}")
        found = value if equals else next(words, None)
        if found is None or (not equals and found.startswith("--")):
            raise UsageError(f"{flag} needs a value: {known[name].metadata['help']}")
        given[name] = found
    values: dict[str, Any] = {name: _parsed(name, text) for name, text in given.items()}
    return Options(**values), rest


def _parsed(name: str, text: str) -> str | int | bool:
    kind, _ = value_type(get_type_hints(Options)[name])
    remedy = {int: "a whole number", bool: "true or false"}.get(kind)
    if remedy is None:
        return text
    try:
        return switch_value(text) if kind is bool else int(text)
    except (ValueError, argparse.ArgumentTypeError):
        flag = f"--{PREFIX}{name} (or GEN2EMBED_{name.upper()})"
        raise UsageError(f"{flag} is {text!r}; pass {remedy}") from None


def wants_us(arguments: Sequence[str]) -> bool:
    """Return whether a command line of VLM2Vec asks for this backbone, as `--model_backbone gen2embed` or with `=`."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == "__model_backbone" and (value if equals else following) == BACKBONE:
            return True
    return False


def usage() -> str:
    """Return our options with their help, one per line."""
    return "\n".join(f"  --{PREFIX + option.name:<24} {option.metadata['help']}" for option in fields(Options))
