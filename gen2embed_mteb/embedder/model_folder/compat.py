"""Workarounds for transformers: Qwen processors without torchvision, and needless warnings.

transformers builds a Qwen processor with a video processor, which needs torchvision even for text. Without torchvision,
`install` removes the video part from the processor's list of parts; with torchvision, it does nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def install() -> None:
    """Let processors load without their video part if torchvision is absent; calling it twice changes nothing."""
    from transformers.processing_utils import ProcessorMixin
    from transformers.utils import is_torchvision_available

    stock = ProcessorMixin.get_attributes.__func__
    if is_torchvision_available() or hasattr(stock, "_leaves_video_out"):
        return

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in stock(cls) if name != "video_processor"]

    get_attributes._leaves_video_out = True  # type: ignore[attr-defined]
    ProcessorMixin.get_attributes = classmethod(get_attributes)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress messages of transformers about choices made here (`lm_head`, `use_fast`, adapters' keys).

    Progress bars are suppressed too, unless standard error is a terminal, where a user waits for a large model to load.
    """
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if bars:
        transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(f"transformers.{name}") for name in _LOADING]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for logger in loggers:
            logger.removeFilter(_is_news)


_LOADING = ("modeling_utils", "integrations.peft", "models.auto.image_processing_auto")


def _is_news(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    # Every key is checked where models and adapters are loaded, and a key that does not fit is an error.
    return "LOAD REPORT" not in message and not message.startswith("The `use_fast` parameter is deprecated")
