"""Paths as people type them on a command line."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path


def expand_home(words: Sequence[str]) -> list[str]:
    """Write the home folder for a `~` at the beginning of a word or of a flag's value: shells leave `--flag=~/x` alone.

    Args:
        words: The words of a command line, of any command.

    Returns:
        The words; one that names a user who does not exist (`~nobody-here/x`) is left as it is.
    """
    return [_expanded(word) for word in words]


def _expanded(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value.startswith("~"):  # else not through `Path`, which takes `a//b` for `a/b`
        with contextlib.suppress(RuntimeError):
            value = str(Path(value).expanduser())
    return flag + equals + value
