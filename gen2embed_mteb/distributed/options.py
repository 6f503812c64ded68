"""The flags that say where vectors are made: in this process (and those that torchrun starts), or on a Ray cluster."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Where the vectors of a run are made; the vectors are the same everywhere."""

    engine: str = option(
        "where vectors are made: local, in this process or in those of torchrun; ray, by workers of a Ray cluster "
        "(extra [ray]), which must see the same folders",
        default="local",
        choices=ENGINES,
    )
    ray_address: str = option(
        "address of the Ray cluster, such as 10.0.0.1:6379 (default: RAY_ADDRESS, the cluster that runs on this host, "
        "or a new one on this host alone)",
        default="",
    )
    num_actors: int | None = option(
        "workers of --engine ray, each with a copy of the model (default: one for each GPU of the cluster; without "
        "GPUs, one for every as many CPUs as this process uses threads)",
        default=None,
        least=1,
    )

    def check_engine(self) -> None:
        """Check the values.

        Raises:
            Gen2EmbedError: Ray is asked for and is not installed, or torchrun started this process; or an option of Ray
                would have no effect.
        """
        check_options(self)
        if self.engine != "ray":
            if self.ray_address or self.num_actors is not None:
                raise Gen2EmbedError("ray_address and num_actors belong to --engine ray; pass it, or leave them out")
            return
        if importlib.util.find_spec("ray") is None:
            raise Gen2EmbedError("engine is 'ray', which is not installed: pip install 'gen2embed[ray]'")
        if (world_size := Share.from_environment().world_size) > 1:
            raise Gen2EmbedError(
                f"engine is 'ray', and WORLD_SIZE is {world_size}: Ray starts its workers itself; start gen2embed "
                "without torchrun, or pass --engine local"
            )

    def loading(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with which this process loads the model.

        With Ray, it uses the model for its fingerprint and to count tokens only, so that no GPU is taken for it.

        Args:
            arguments: What `Gen2Embed` takes.
        """
        return arguments | {"device": "cpu"} if self.engine == "ray" else arguments
