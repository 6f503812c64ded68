"""Where transformers stands in the way: Qwen processors without torchvision, and a needless warning.

transformers builds a Qwen processor with a video processor, which needs torchvision even for text. Where torchvision is
absent, `install` takes the video part out of the processor's list of parts; where it is present, it does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def install() -> None:
    """Let processors load without their video part where torchvision is absent. Idempotent."""
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
def quiet_about_head() -> Iterator[None]:
    """Hold back transformers' report of weights that were not loaded, if it names the unused `lm_head` alone."""
    loading = logging.getLogger("transformers.modeling_utils")
    loading.addFilter(_tells_more_than_the_head)
    try:
        yield
    finally:
        loading.removeFilter(_tells_more_than_the_head)


def _tells_more_than_the_head(record: logging.LogRecord) -> bool:
    report = record.getMessage()
    rows = [line for line in report.splitlines() if "|" in line and not line.startswith("Key")]
    return "LOAD REPORT" not in report or not rows or not all("lm_head" in r and "UNEXPECTED" in r for r in rows)
