"""The flags of `gen2embed plan`; they are listed without loading a model's libraries."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.config import ModelName, PromptOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.names import Side

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PromptOptions, ModelName):
    """With which model and on what the run is planned."""

    gpu: str = option("type of the GPUs: T4, V100, A10, L4, L40S, A100, H100, H200, B200 or MI300X", default="H100")
    num_gpus: int = option("number of GPUs", default=1, least=1)
    utilization: float = option("share of the GPUs' published peak that is assumed to be reached", default=0.4, most=1)
    dtype: str = option("type of the weights", default="bfloat16", choices=DTYPES)
    max_length: int | None = option("longest input in tokens", default=None, least=1)
    num_sampled: int = option("inputs of each side whose lengths are counted; they stand for all", default=500, least=1)
    pool_size: int = option("candidates that a search keeps for each query (SaHa: m k)", default=42, least=1)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range.
        """
        check_options(self)
        if not self.utilization > 0:
            raise Gen2EmbedError(f"utilization is {self.utilization}; pass a share above 0, such as 0.4")


@dataclass(frozen=True, kw_only=True)
class SideOption:
    """On which side an input is encoded."""

    side: Side = option(
        "query: what one searches with; document: what is found", default="document", choices=("query", "document")
    )


@dataclass(frozen=True, kw_only=True)
class NumbersOptions:
    """Numbers of inputs and their lengths, where there is no data yet."""

    num_queries: int = option("number of queries", default=0, least=0)
    num_candidates: int = option("number of candidates", default=0, least=0)
    query_tokens: int = option("tokens of a query that are run, pictures included", default=64, least=1)
    candidate_tokens: int = option("tokens of a candidate that are run, pictures included", default=64, least=1)
    query_patches: int = option("patches of the picture of a query (0: it has none)", default=0, least=0)
    candidate_patches: int = option("patches of the picture of a candidate (0: it has none)", default=0, least=0)
    search: bool = option("plan the search of all candidates for each query, too", default=False)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: There is nothing to plan.
        """
        check_options(self)
        if not self.num_queries and not self.num_candidates:
            raise Gen2EmbedError("num_queries and num_candidates are both 0; pass how many inputs there will be")
        if self.search and not (self.num_queries and self.num_candidates):
            raise Gen2EmbedError("a search needs --num_queries and --num_candidates")
