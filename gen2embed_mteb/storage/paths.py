"""Expanding `~` in paths that users type on a command line, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path


def expand_home(words: Sequence[str]) -> list[str]:
    """Replace a `~` at the beginning of a word or of a flag's value by the home folder.

    Shells replace it only at the beginning of a word, not in `--flag=~/x`.

    Args:
        words: The words of a command line, of any command.

    Returns:
        The words; a word that names a user who does not exist (`~nobody-here/x`) stays as it is.
    """
    return [_expanded(word) for word in words]


def user_cache() -> Path:
    """Return our folder in the user's cache folder; nothing is created."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gen2embed"


def _expanded(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if value.startswith("~"):  # other values do not go through `Path`, which would change `a//b` to `a/b`
        with contextlib.suppress(RuntimeError):
            value = str(Path(value).expanduser())
    return flag + equals + value
