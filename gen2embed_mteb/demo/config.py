"""The settings of the demo, apart from what runs it: its flags are listed without loading a model's libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.flags import check_options, option


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The settings of the demo."""

    output_dir: Path = option("where results and the report go", default=Path("demo"))
    data_dir: Path | None = option("where MMEB-mini is kept (default: the user's cache folder)", default=None)
    limit: int | None = option("rows per dataset, for a quick look", default=None, least=1)
    max_steps: int = option("steps of fine-tuning; 0: zero-shot only", default=24, least=0)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
