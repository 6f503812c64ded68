"""Settings of rerankers: what `gen2embed export` writes, and whether `gen2embed evaluate` reranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option

KINDS = ("embedder", "reranker")
STOCK_FRAMINGS = ("mcq", "yes-no", "true-false")
"""The framings that stock modules express; `framings` checks the same by what a framing needs."""


FRAMING_NAMES = ("mcq", "mcq-both", "yes-no", "true-false", "likelihood")
"""Every framing, for the help; `framings.FRAMINGS` defines them."""
_FORWARDS = {"mcq-both": 2, "likelihood": 2}
"""Forward passes per pair, where it is not one: the question in both orders; the answer with and without the query."""


@dataclass(frozen=True, kw_only=True)
class RerankOptions:
    """Whether an evaluation reranks the best candidates of each row."""

    rerank: str | None = option(
        "rerank the best candidates of each row with the model itself, asked so (default: no reranking)",
        default=None,
        choices=FRAMING_NAMES,
    )
    rerank_top: int = option("candidates per row that are reranked", default=10, least=1)
    rerank_weight: float = option(
        "the order is by the framing's score plus this times the embedding's score; 0: by the framing's alone",
        default=0.0,
    )
    rerank_limit: int | None = option(
        "rows per dataset that are reranked, from the first (default: all)", default=None, least=1
    )

    def check_rerank(self) -> None:
        """Refuse settings of reranking without it.

        Raises:
            Gen2EmbedError: `rerank_top`, `rerank_weight` or `rerank_limit` is given, and `rerank` is not; or the weight
                is negative or not finite.
        """
        if not 0 <= self.rerank_weight < math.inf:
            raise Gen2EmbedError(f"rerank_weight is {self.rerank_weight}; pass 0 or a positive number")
        if self.rerank is None and (self.rerank_top != 10 or self.rerank_weight or self.rerank_limit is not None):
            raise Gen2EmbedError(
                "rerank_top, rerank_weight and rerank_limit need --rerank FRAMING; pass it, or leave them out"
            )

    @property
    def reranking(self) -> str:
        """A name of these options for folders; empty without reranking."""
        weight = f"-weight-{self.rerank_weight:g}" if self.rerank_weight else ""
        return "" if self.rerank is None else f"rerank-{self.rerank}-{self.rerank_top}{weight}"

    @property
    def forwards_per_candidate(self) -> int:
        """Forward passes of the model per candidate that is reranked; 0 without reranking."""
        return 0 if self.rerank is None else _FORWARDS.get(self.rerank, 1)

    def rerank_settings(self) -> dict[str, Any]:
        """Return the options by name; none without reranking."""
        if self.rerank is None:
            return {}
        weight = {"rerank_weight": self.rerank_weight} if self.rerank_weight else {}
        return {"rerank": self.rerank, "rerank_top": self.rerank_top, "rerank_limit": self.rerank_limit, **weight}


@dataclass(frozen=True, kw_only=True)
class ExportKind:
    """What `export` writes."""

    kind: str = option("what is written", default="embedder", choices=KINDS, flag="as")
    framing: str | None = option(f"how a reranker is asked: {', '.join(STOCK_FRAMINGS)} (default: mcq)", default=None)
    check: bool = option(
        "load what was written in plain sentence-transformers, in a process without this package, and compare the "
        "vectors of every kind of input",
        default=False,
    )

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is unknown, a framing is given for an embedder, or a check for a reranker.
        """
        if self.kind not in KINDS:
            raise Gen2EmbedError(f"--as is {self.kind!r}; known: {', '.join(KINDS)}")
        check_options(self)
        if self.framing is not None and self.kind != "reranker":
            raise Gen2EmbedError(f"--framing {self.framing} is for rerankers; add --as reranker, or leave it out")
        if self.check and self.kind == "reranker":
            raise Gen2EmbedError("--check compares vectors, which --as reranker has none of; leave one out")
