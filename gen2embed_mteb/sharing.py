"""Several processes at one piece of work, by rank: no coordinator, only the shards that appear in the shared store.

Process r of n makes every n-th missing shard, then waits for the others' to appear. If none appears for `patience`
seconds (a process that died on another host), it makes the next one itself; done twice, a shard has the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.store import EmbeddingStore, Shard


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Attributes:
        rank: This process, from 0.
        world_size: All processes.
        patience: Seconds without a new shard after which another process's shard is made here.
        poll_interval: Seconds between two looks at the store.
    """

    rank: int = 0
    world_size: int = 1
    patience: float = 600.0
    poll_interval: float = 0.2

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: The rank is not below the number of processes.
        """
        if not 0 <= self.rank < self.world_size:
            raise Gen2EmbedError(f"RANK is {self.rank}, WORLD_SIZE {self.world_size}; a rank is 0 to WORLD_SIZE - 1")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Share:
        """The share that `torchrun` gives this process by RANK and WORLD_SIZE; all of the work without them.

        On several hosts without torchrun, set the two by hand and share the output folder.

        Args:
            environment: By default `os.environ`.

        Raises:
            ValueError: One of the two is no number, or they do not fit.
        """
        found = os.environ if environment is None else environment
        return cls(int(found.get("RANK", "0")), int(found.get("WORLD_SIZE", "1")))

    def owns(self, number: int) -> bool:
        """Whether a shard of this number is this process's: every `world_size`-th, so that all get long and short ones.

        The number must count all shards, made or not: processes that start one after the other must agree.
        """
        return number % self.world_size == self.rank

    def await_others(self, keys: Sequence[str], store: EmbeddingStore) -> Iterator[tuple[str, Shard | None]]:
        """Yields the shards that other processes make, as they appear.

        Args:
            keys: The shards' keys.
            store: The store that all write to.

        Yields:
            A key and its shard; `None` for a shard that this process is to make, before it asks for the next.
        """
        pending = list(keys)
        last = time.monotonic()
        while pending:
            found = [(key, shard) for key in pending if (shard := store.get(key)) is not None]
            if found:
                yield from found
                done = {key for key, _ in found}
                pending = [key for key in pending if key not in done]
                last = time.monotonic()
            elif time.monotonic() - last > self.patience:
                yield pending.pop(0), None
                last = time.monotonic() - self.patience  # the next one at once, unless the others are back
            else:
                time.sleep(self.poll_interval)
