"""The progress bars of bulk encoding; they are shown on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def token_bar(total: int, label: str, *, silent: bool) -> Iterator[Any]:
    """Yield a progress bar over tokens, which estimates the remaining time better than the number of inputs.

    Below another bar it disappears at its end.
    """
    from tqdm import tqdm

    off = silent or not sys.stderr.isatty()
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, disable=off, leave=None) as bar:
        yield bar


def progress(items: Iterator[Any], total: int, label: str, unit: str) -> Iterator[Any]:
    """Yield items under a progress bar, which is shown on a terminal only."""
    from tqdm import tqdm

    return iter(tqdm(items, total=total, unit=unit, desc=label, disable=not sys.stderr.isatty(), leave=False))
