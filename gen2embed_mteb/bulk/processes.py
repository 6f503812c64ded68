"""Sharing one piece of work among several processes by rank, without a coordinator.

The processes see each other only by the shards that appear in the shared store. Process r of n computes every n-th
shard that is missing, then waits until the others' shards appear. A process whose shards do not appear for `patience`
seconds (it died, perhaps on another host) is considered dead for the rest of the run, and the remaining processes
compute its shards. If two processes compute the same shard, the bytes are the same.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from gen2embed_mteb.errors import Gen2EmbedError

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
"""A shard of the store that the processes share."""

NOTICE = 0.1
"""The fraction of the patience after which a message tells the user which process is waited for."""


@dataclass(frozen=True)
class Share:
    """The part of the work that belongs to this process.

    Attributes:
        rank: The number of this process, from 0.
        world_size: The number of all processes.
        patience: Seconds without a new shard after which another process is considered dead.
        poll_interval: Seconds between two checks of the store.
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
        """Return the share that `torchrun` gives this process by RANK and WORLD_SIZE; without them, all of the work.

        On several hosts without torchrun, set the two variables by hand and share the output folder.

        Args:
            environment: The environment variables; `os.environ` by default.

        Raises:
            ValueError: One of the two is not a number, or the rank is not below the number of processes.
        """
        found = os.environ if environment is None else environment
        said = {name: found.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
        try:
            rank, world_size = (int(value) for value in said.values())
        except ValueError as error:
            raise Gen2EmbedError(f"{said}: both must be whole numbers; unset them, or start by torchrun") from error
        return cls(rank, world_size)

    def owns(self, number: int) -> bool:
        """Return whether the shard of this number belongs to this process.

        Every `world_size`-th shard does, so that each process gets shards of long and of short inputs. The number must
        count all shards, finished or not, so that processes that start at different times agree.
        """
        return number % self.world_size == self.rank


class Peers:
    """The other processes of a run, with a record of which are considered dead.

    Args:
        share: The part of the work that belongs to this process.
    """

    def __init__(self, share: Share) -> None:
        """Consider all processes alive."""
        self._share = share
        self._dead: set[int] = set()
        self._noticed: set[int] = set()

    def await_others(
        self, numbers: Mapping[str, int], find: Callable[[str], Found | None]
    ) -> Iterator[tuple[str, Found | None]]:
        """Yield the shards that other processes compute, as they appear.

        Args:
            numbers: The number of each shard by its key; the number tells which process a shard belongs to.
            find: Returns a shard from the store that all processes share, or None.

        Yields:
            A key and its shard; `None` for a shard that this process must compute before it asks for the next one.
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
                # The remaining processes begin at different places, so that few shards are computed twice.
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
        """Consider a process alive again if no other process can have computed its shard."""
        if rank in self._dead and len(self._dead) == self._share.world_size - 1:
            self._dead.discard(rank)
            logger.warning("process %d of %d is back", rank, self._share.world_size)
