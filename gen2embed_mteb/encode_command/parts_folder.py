"""The output folder of `gen2embed encode` while it is filled: the files of each part, and a marker that proves them.

A marker, `.gen2embed-encode/part-000000.json`, holds the digest of what was encoded (texts, bytes of images, ids), of
the settings and model, and of each file. A part counts as made only if its marker fits and its files are as it says; so
a killed run, a damaged file and an input that changed are all noticed, and only such parts are made again. Only files
that a marker proves to be ours are replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from gen2embed_mteb.bulk.shard_checks import DamagedError, read_regular
from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.encode_command.part_files import count_rows
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run_folder import UNKNOWN
from gen2embed_mteb.storage.atomic import (
    ForeignFileError,
    json_bytes,
    remove_proved,
    remove_stale,
    set_aside,
    sha256_of,
    write_atomic,
)
from gen2embed_mteb.storage.held_folder import held_folder, remove_abandoned
from gen2embed_mteb.storage.owned_folder import MADE_BY, OwnedFolder
from gen2embed_mteb.version import __version__

logger = logging.getLogger(__name__)

WRITER = "encode"
INSIDE = ".gen2embed-encode"
"""The folder of the markers, in the output folder."""
RUN = "run.json"
MANIFEST, ERRORS = "manifest.json", "errors.jsonl"
FORMAT = 1
_MARKER = re.compile(r"part-(\d{6,})\.json")
_PART = re.compile(r"part-(\d{6,})\.(parquet|npy|jsonl)")


def is_written(name: str) -> bool:
    """Return whether an output folder has, or may get, a file of this name."""
    return name in (MANIFEST, ERRORS) or _PART.fullmatch(name) is not None


@dataclass(frozen=True)
class PartRecord:
    """What was made of a part.

    Attributes:
        number: The part's number.
        content: The digest of what was encoded.
        num_rows: The number of its rows, faulty ones included.
        num_vectors: The number of its vectors.
        width: The numbers per vector; 0 if there are none.
        files: The SHA-256 of each file by its name, the one with the vectors first; empty if there are no vectors.
        errors: Row, id, file and reason of each row that was set aside.
        num_halvings: How often a batch was halved because memory ran out, which may change the last bits.
    """

    number: int
    content: str
    num_rows: int
    num_vectors: int
    width: int
    files: dict[str, str] = field(default_factory=dict)
    errors: list[list[Any]] = field(default_factory=list)
    num_halvings: int = 0


class PartsFolder:
    """The output folder.

    Args:
        path: The folder.
        settings: All that decides the vectors and the form of the files, by name.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Keep the arguments; nothing is read yet."""
        self.path = Path(path)
        self.settings = dict(settings)
        self.inside = self.path / INSIDE
        self.owned = OwnedFolder(self.path, WRITER)
        decisive = {name: value for name, value in self.settings.items() if name != "input"}
        self._digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder of another run, or with files in it that we did not write; call it before a model is loaded.

        Args:
            overwrite: Whether what another run wrote may be replaced.

        Raises:
            StoreMismatchError: The folder is of another run; the message says how it differs.
            ForeignFileError: A file of ours would replace one that is not, or lie among others of its kind.
        """
        self.owned.check([MANIFEST, ERRORS])
        if self._read_run() is None and not overwrite:  # a killed run with `overwrite` may leave parts and no record
            self._refuse_parts_of_others()
        if (differing := self._differing()) and not overwrite:
            raise StoreMismatchError(
                f"{self.path}: made by another run ({'; '.join(differing)}); pass another --output_dir, or --overwrite "
                "to drop its vectors"
            )

    def begin(self, *, overwrite: bool) -> None:
        """Make the folder ready for this run; with `overwrite`, what another run wrote is deleted.

        Args:
            overwrite: Whether what another run wrote may be replaced.

        Raises:
            StoreMismatchError: As for `check`.
        """
        self.inside.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self.check(overwrite=overwrite)
            if self._differing():
                logger.warning("%s: dropping vectors made by another run", self.path)
                self._drop_reports()
                self.drop_from(0)
                remove_proved(self.inside / RUN, sha256_of(self.inside / RUN))  # `_read_run` found it to be ours
            if self._read_run() is None:
                run = {"made_by": MADE_BY, "format": FORMAT, "settings": self.settings}
                write_atomic(self.inside / RUN, json_bytes(run))
            remove_abandoned(self.inside)
        remove_stale(self.path)
        remove_stale(self.inside)

    def tidy(self, files: Set[str]) -> None:
        """Rename files that would be taken for parts and are none, and delete what dead processes left.

        Such a file is left by a run that was killed before it had written the marker.

        Args:
            files: The names of all files of the parts.
        """
        with self._lock():
            for path in sorted(self.path.iterdir()):
                if _PART.fullmatch(path.name) and path.name not in files:
                    logger.warning("%s is of no part; it is kept as %s", path, set_aside(path).name)
            remove_abandoned(self.inside)

    def scratch(self) -> AbstractContextManager[Path]:
        """Make a temporary folder that no other process removes while this one lives; it is deleted in the end."""
        self.inside.mkdir(parents=True, exist_ok=True)
        return held_folder(self.inside / "images", self._lock())

    def numbers(self) -> set[int]:
        """Return the numbers of the parts that have a marker."""
        found = (_MARKER.fullmatch(path.name) for path in self.inside.glob("part-*.json"))
        return {int(match[1]) for match in found if match}

    def find(self, number: int, content: str | None = None, *, checked: bool = True) -> PartRecord | None:
        """Return the record of a part if it is made, and as it was written.

        Args:
            number: The part's number.
            content: The digest of what is to be encoded; None accepts any.
            checked: Whether the files are read and compared with their digests.

        Returns:
            The record; None if the part must be made. A warning reports damage.
        """
        try:
            record = self._read(number)
            if record is None or (content is not None and record.content != content):
                return None
            if checked:
                self._verify(record)
            return record
        except DamagedError as error:
            logger.warning("%s: part %d is damaged (%s); it is made again", self.path, number, error)
            return None

    def put(self, record: PartRecord, files: Mapping[str, bytes]) -> PartRecord:
        """Write a part, then its marker, and read both back; an equal part that another process wrote is kept.

        Args:
            record: The part, without `files`.
            files: The content of its files by name, the one with the vectors first.

        Returns:
            The record with the digests of the files.

        Raises:
            OSError: What was read back is not what was written: the disk fails.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        made = PartRecord(**{**asdict(record), "files": digests})
        with self._lock():
            found = self.find(record.number, record.content)
            if found is not None:
                return found
            self._drop_reports()
            self._remove(record.number)
            for name, data in files.items():
                _write(self.path / name, data)
            marker = {"made_by": MADE_BY, "version": __version__, "format": FORMAT, "settings": self._digest}
            _write(self._marker(record.number), json_bytes({**marker, **asdict(made)}))
        try:
            self._verify(made)
        except DamagedError as error:
            raise OSError(f"{self.path}: {error} after it was written; check the disk") from error
        return made

    def drop_from(self, number: int) -> int:
        """Delete the parts from a number on, which this run does not have, and return how many there were."""
        doomed = sorted(found for found in self.numbers() if found >= number)
        for one in doomed:
            self._remove(one)
        return len(doomed)

    def _refuse_parts_of_others(self) -> None:
        """Refuse files with the names of parts that no marker of ours proves."""
        ours = self.numbers()
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            if (match := _PART.fullmatch(path.name)) and int(match[1]) not in ours:
                raise ForeignFileError.of(path, "has the name of a part of this run, which has not begun")

    def _marker(self, number: int) -> Path:
        return self.inside / f"part-{number:06d}.json"

    def _lock(self) -> FileLock:
        return FileLock(self.inside / "lock")

    def _read(self, number: int) -> PartRecord | None:
        """Return the record of a part of these settings; None if there is none."""
        try:
            marker = json.loads(read_regular(self._marker(number)))
            record = _record(marker)
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"its marker is not as we wrote it: {error}") from error
        if marker["settings"] != self._digest or record.number != number:
            raise DamagedError("its marker is of other settings")
        return record

    def _verify(self, record: PartRecord) -> None:
        for name, digest in record.files.items():
            path = self.path / name
            if not path.is_file():
                raise DamagedError(f"{name} is missing")
            if sha256_of(path) != digest:
                raise DamagedError(f"{name} is not as it was written")
        if record.files and count_rows(self.path, list(record.files)) != record.num_vectors:
            raise DamagedError(f"{next(iter(record.files))} has not {record.num_vectors} rows")

    def _remove(self, number: int) -> None:
        """Delete the marker of a part, of whatever settings, and the files that it proves to be ours."""
        try:
            data = read_regular(self._marker(number))
            record = _record(json.loads(data))
        except (DamagedError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return
        for name, digest in record.files.items():  # before the marker, without which nothing would prove them
            if "/" not in name:
                remove_proved(self.path / name, digest)
        remove_proved(self._marker(number), hashlib.sha256(data).hexdigest())

    def _drop_reports(self) -> None:
        """Delete the manifest, without which a folder counts as unfinished, and the errors."""
        for name in (MANIFEST, ERRORS):
            self.owned.remove(name)

    def _differing(self) -> list[str]:
        run = self._read_run()
        if run is None:
            return []
        found = {**run["settings"]}
        return [
            f"{name} is {found.get(name)!r} there and {self.settings.get(name)!r} now"
            for name in dict.fromkeys([*self.settings, *found])
            if (name, self.settings.get(name)) != ("fingerprint", UNKNOWN)
            and _comparable(name, found.get(name)) != _comparable(name, self.settings.get(name))
        ]

    def _read_run(self) -> dict[str, Any] | None:
        path = self.inside / RUN
        try:
            run = json.loads(read_regular(path))
            if run["made_by"] == MADE_BY and run["format"] == FORMAT and isinstance(run["settings"], dict):
                return dict(run)
        except FileNotFoundError:
            return None
        except (DamagedError, ValueError, LookupError, TypeError, RecursionError):
            pass
        raise ForeignFileError.of(path, "is no record of gen2embed encode")


def _comparable(name: str, value: Any) -> Any:
    """Return a setting in a form in which two spellings of the same path are equal."""
    return os.path.realpath(Path(value).expanduser()) if name == "input" and isinstance(value, str) else value


def _record(marker: Mapping[str, Any]) -> PartRecord:
    if marker["made_by"] != MADE_BY or marker["format"] != FORMAT:
        raise Gen2EmbedError("it is not of gen2embed")
    record = PartRecord(**{name: marker[name] for name in PartRecord.__dataclass_fields__})
    counts = (record.number, record.num_rows, record.num_vectors, record.width, record.num_halvings)
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(record.errors, list):
        raise Gen2EmbedError("a count is none")
    if not all(isinstance(part, str) for pair in record.files.items() for part in pair):
        raise Gen2EmbedError("a digest is none")
    return record


def _write(path: Path, data: bytes) -> None:
    """Write a new file; another file of that name that is neither the same nor proved to be ours is renamed."""
    try:
        write_atomic(path, data)
    except ForeignFileError:
        logger.warning("%s is not proved to be ours; it is kept as %s", path, set_aside(path).name)
        write_atomic(path, data)
