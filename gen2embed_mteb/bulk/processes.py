"""Several processes at one piece of work, by rank: no coordinator, only the shards that appear in the shared store.

Process r of n makes every n-th missing shard, then waits for the others' to appear. A process whose shards do not
appear for `patience` seconds (it died, perhaps on another host) is taken for dead, once and for all of the run, and its
shards are made by those that are left; done twice, a shard has the same bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gen2embed_mteb.bulk.store import StoredShard
from gen2embed_mteb.errors import Gen2EmbedError

logger = logging.getLogger(__name__)

NOTICE = 0.1
"""The part of the patience after which a user is told what is waited for."""


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Attributes:
        rank: This process, from 0.
        world_size: All processes.
        patience: Seconds without a new shard after which another process is taken for dead.
        poll_interval: Seconds between two looks at the store.
    """

    rank: int = 0
    world_size: int = 1
    patience: float = 600.0
    poll_interval: float = 0.2

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: The rank is not below the number of processes.
        """
        if not 0 <= self.rank < self.world_size:
            raise Gen2EmbedError(f"RANK is {self.rank}, WORLD_SIZE {self.world_size}; a rank is 0 to WORLD_SIZE - 1")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Share:
        """Return the share that `torchrun` gives this process by RANK and WORLD_SIZE; all of the work without them.

        On several hosts without torchrun, set the two by hand and share the output folder.

        Args:
            environment: By default `os.environ`.

        Raises:
            ValueError: One of the two is no number, or they do not fit.
        """
        found = os.environ if environment is None else environment
        said = {name: found.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        try:
            rank, world_size = (int(value) for value in said.values())
        except ValueError as error:
            raise Gen2EmbedError(f"{said}: both must be whole numbers; unset them, or start by torchrun") from error
        return cls(rank, world_size)

    def owns(self, number: int) -> bool:
        """Return whether a shard of this number is this process's: every `world_size`-th, so that all get long and short ones.

        The number must count all shards, made or not: processes that start one after the other must agree.
        """
        return number % self.world_size == self.rank


class Peers:
    """The other processes of a run, and which of them were found to be dead.

    Args:
        share: Which part is this process's.
    """

    def __init__(self, share: Share) -> None:
        """Take all of them to be alive."""
        self._share = share
        self._dead: set[int] = set()
        self._noticed: set[int] = set()

    def await_others(
        self, numbers: Mapping[str, int], find: Callable[[str], StoredShard | None]
    ) -> Iterator[tuple[str, StoredShard | None]]:
        """Yield the shards that other processes make, as they appear.

        Args:
            numbers: The shards' keys and numbers; the number says whose a shard is.
            find: Looks a shard up in the store that all write to.

        Yields:
            A key and its shard; `None` for a shard that this process is to make, before it asks for the next.
        """
        share = self._share
        pending = {key: number % share.world_size for key, number in numbers.items()}
        heard = dict.fromkeys(pending.values(), time.monotonic())
        while pending:
            found = [(key, shard) for key in pending if (shard := find(key)) is not None]
            for key, shard in found:
                rank = pending.pop(key)
                heard[rank] = time.monotonic()
                self._hear_from(rank)
                yield key, shard
            if found:
                continue
            for rank in set(pending.values()):
                self._judge(rank, time.monotonic() - heard[rank])
            orphans = [key for key, rank in pending.items() if rank in self._dead]
            if orphans:
                # Those that are left begin at different places, so that few shards are made twice.
                key = orphans[share.rank * len(orphans) // share.world_size]
                del pending[key]
                yield key, None
            else:
                time.sleep(share.poll_interval)

    def _judge(self, rank: int, silence: float) -> None:
        share = self._share
        if rank in self._dead:
            return
        if silence > share.patience:
            self._dead.add(rank)
            logger.warning(
                "process %d of %d finished nothing for %.0f s and is taken for dead: its part is made by the others",
                rank,
                share.world_size,
                silence,
            )
        elif silence > NOTICE * share.patience and rank not in self._noticed:
            self._noticed.add(rank)
            logger.warning(
                "waiting for process %d of %d; without a sign of it for %.0f s its part is made here",
                rank,
                share.world_size,
                share.patience,
            )

    def _hear_from(self, rank: int) -> None:
        """Take a process for alive again if nobody else can have made its shard."""
        if rank in self._dead and len(self._dead) == self._share.world_size - 1:
            self._dead.discard(rank)
            logger.warning("process %d of %d is back", rank, self._share.world_size)
