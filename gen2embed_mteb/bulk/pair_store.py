"""Scores of query-candidate pairs on disk, so that a run that was killed goes on where it stopped.

The unit is a shard: the rows of one piece of work, each with the scores of its pairs, or with the reason why it has
none. A shard is one JSON file, written atomically, and named after the digest of its work: the fingerprint of the
model, the framing, and all texts and images. JSON keeps every bit of a number, so that a resumed run ends with the same
figures. Shards of other models or framings may stand in the same folder; they are not looked at.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen2embed_mteb.bulk.shard_checks import DamagedError, read_regular
from gen2embed_mteb.storage.atomic import ForeignFileError, json_bytes, remove_stale, set_aside, write_atomic
from gen2embed_mteb.storage.owned_folder import MADE_BY
from gen2embed_mteb.version import __version__

logger = logging.getLogger(__name__)

FORMAT = 1
_STEM = 32  # digits of the key that name a shard's file


@dataclass(frozen=True)
class ScoredRow:
    """The pairs of one query.

    Attributes:
        scores: One score per candidate; empty if the row failed.
        answers: How many answers were read: one per candidate and question, or none where no answer is read.
        mass: The sum over them of the probability of the two options together.
        first: In how many the first option was the more probable one.
        num_tokens: How many tokens went through the model.
        num_tokens_in_full: How many would have, without the query's part being shared.
        fault: The file and the reason, if the row failed; else empty.
    """

    scores: tuple[float, ...] = ()
    answers: int = 0
    mass: float = 0.0
    first: int = 0
    num_tokens: int = 0
    num_tokens_in_full: int = 0
    fault: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoredShard:
    """The rows of a piece of work, and the seconds that they took."""

    rows: tuple[ScoredRow, ...]
    seconds: float


class PairStore:
    """A folder of shards.

    Args:
        directory: The folder; it is created if missing.
        identity: The digest of everything that scores depend on besides the work itself.
    """

    def __init__(self, directory: str | Path, identity: str) -> None:
        """Create the folder."""
        self.directory = Path(directory)
        self.identity = identity
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_stale(self.directory)

    def key(self, work: Any) -> str:
        """Return the digest of a piece of work: 64 hexadecimal digits.

        Args:
            work: Anything that JSON can hold.
        """
        return hashlib.sha256(json.dumps([FORMAT, self.identity, work]).encode()).hexdigest()

    def get(self, key: str, candidates: list[int]) -> ScoredShard | None:
        """Return a shard if the store holds it.

        Args:
            key: The digest of the work.
            candidates: The number of candidates of each row.

        Returns:
            The shard; None if it is missing or damaged. A warning reports damage; its pairs must be scored again.

        Raises:
            OSError: The system cannot read the file; it may be intact.
        """
        path = self._path(key)
        try:
            return _parsed(read_regular(path), key, candidates)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            logger.warning("%s: damaged shard (%s); its pairs are scored again", path, error)
            return None

    def put(self, key: str, shard: ScoredShard) -> ScoredShard:
        """Write a shard; if another process has finished the same shard meanwhile, keep that one.

        Args:
            key: The digest of the work.
            shard: The shard.
        """
        found = self.get(key, [len(row.scores) for row in shard.rows]) if self._path(key).exists() else None
        if found is not None:
            return found
        rows = [dataclasses.asdict(row) for row in shard.rows]
        content = {"made_by": MADE_BY, "version": __version__, "key": key, "seconds": shard.seconds, "rows": rows}
        data, path = json_bytes({**content, "sha256": _digest(content)}), self._path(key)
        try:
            write_atomic(path, data)
        except ForeignFileError:
            logger.warning("%s is not proved to be ours; it is kept as %s", path, set_aside(path).name)
            write_atomic(path, data)
        return shard

    def _path(self, key: str) -> Path:
        return self.directory / f"{key[:_STEM]}.json"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(data: bytes, key: str, candidates: list[int]) -> ScoredShard:
    """Return a shard that has exactly our form.

    Raises:
        DamagedError: It has another form, or is of other work.
    """
    try:
        content = json.loads(data)
        digest = content.pop("sha256")
        if digest != _digest(content):
            raise DamagedError("its checksum differs")
        if content["key"] != key or content["made_by"] != MADE_BY:
            raise DamagedError("it is of other work")
        rows = tuple(
            ScoredRow(**{**row, "scores": tuple(map(float, row["scores"])), "fault": tuple(map(str, row["fault"]))})
            for row in content["rows"]
        )
        seconds = float(content["seconds"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"it is no shard of ours: {error}") from error
    expected = [len(row.scores) if row.fault else count for row, count in zip(rows, candidates, strict=False)]
    if len(rows) != len(candidates) or [len(row.scores) for row in rows] != expected:
        raise DamagedError("it has other rows than the work")
    return ScoredShard(rows, seconds)
