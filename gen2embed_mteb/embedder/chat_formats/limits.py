"""Limits for rendering a chat template, which comes from others: it may loop for ever, or write a text without end.

Jinja has no such limit of its own. A template is compiled to Python; here the lines that it runs are counted.

Cost: a rendering takes a few times as long. Only the trials at loading are counted, never the encoding of inputs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

MAX_LINES = 200_000
"""The most lines of Python that one rendering may run; published templates run far fewer."""
MAX_SECONDS = 5.0
"""The most processor time of one rendering, for templates whose single lines are slow."""
MAX_CHARACTERS = 200_000
"""The longest text that may become of one short turn."""

_FILE = "<template>"
"""The name of the file that Jinja gives to the code of a template that is compiled from a text."""


class TemplateLimitError(Gen2EmbedError):
    """A chat template runs or writes more than is allowed."""


@contextmanager
def limited_lines() -> Iterator[None]:
    """Stop a template that runs more than `MAX_LINES` lines, or `MAX_SECONDS`, in this block and in this thread.

    A single line that takes for ever is not stopped.

    Raises:
        TemplateLimitError: It does.
    """
    ran, begun = 0, time.thread_time()

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal ran
        if frame.f_code.co_filename != _FILE:
            return None
        ran += 1
        if ran > MAX_LINES or time.thread_time() - begun > MAX_SECONDS:
            raise TemplateLimitError(
                f"the chat template runs more than {MAX_LINES} lines or {MAX_SECONDS:g} seconds for one turn: it has a "
                "loop that is too long. Correct the loop, or pass a template of your own: "
                "processor_kwargs={'chat_template': …}"
            )
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def check_length(rendered: str) -> None:
    """Refuse a rendered turn that is longer than any prompt.

    Args:
        rendered: What became of a short turn.

    Raises:
        TemplateLimitError: It has more than `MAX_CHARACTERS` characters.
    """
    if len(rendered) > MAX_CHARACTERS:
        raise TemplateLimitError(
            f"the chat template writes {len(rendered)} characters for one turn, at most {MAX_CHARACTERS} are taken: "
            "shorten what it writes, or pass a template of your own: processor_kwargs={'chat_template': …}"
        )
