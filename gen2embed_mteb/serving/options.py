"""The flags of `gen2embed serving-check`."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.serving.comparison import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """Which server is checked, and how it is asked."""

    url: str = option("address of the server, such as http://localhost:8000", positional=True)
    model: str = option("exported directory that the server was started on", positional=True)
    served_model_name: str = option("name of the model on the server (default: the first that it lists)", default="")
    precision: str = option(
        "type of the server's weights, which sets the least cosine: 0.9999 for float32, 0.999 for the others",
        default="float32",
        choices=PRECISIONS,
    )
    timeout: float = option("longest wait for an answer, in seconds", default=60.0, least=0.1)
    api_key_variable: str = option(
        "variable of the environment that holds the server's key (default: no key is sent)", default=""
    )
    device: str | None = option("where the local model runs: cpu, cuda, cuda:1, …", default=None)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class UnmergedOption:
    """Whether `export` writes an adapter beside its base model."""

    vllm_adapter: str = option(
        "do not merge --adapter: write it to this directory for vLLM's --lora-modules, and the base model to OUTPUT",
        default="",
    )
