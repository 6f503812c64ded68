"""The settings of `gen2embed export` beside those of the model: which kind of model is written."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option

KINDS = ("embedder", "reranker")
STOCK_FRAMINGS = ("mcq", "yes-no", "true-false")
"""The framings that stock modules express; `framings` checks the same by what a framing needs."""


@dataclass(frozen=True, kw_only=True)
class ExportKind:
    """What `export` writes."""

    kind: str = option("what is written", default="embedder", choices=KINDS, flag="as")
    framing: str | None = option(f"how a reranker is asked: {', '.join(STOCK_FRAMINGS)} (default: mcq)", default=None)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is unknown, or a framing is given for an embedder.
        """
        if self.kind not in KINDS:
            raise Gen2EmbedError(f"--as is {self.kind!r}; known: {', '.join(KINDS)}")
        check_options(self)
        if self.framing is not None and self.kind != "reranker":
            raise Gen2EmbedError(f"--framing {self.framing} is for rerankers; add --as reranker, or leave it out")
