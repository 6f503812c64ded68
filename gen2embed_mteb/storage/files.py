"""Writing, replacing and deleting files: this module alone does it, and only to what is proved to be ours.

The rule: we replace or delete a file only if we can prove that we wrote it and that nobody changed it since. The proof
is the ledger `.gen2embed-files.json` in the folder: it holds our name, our version, and for every file its SHA-256 and
the command that wrote it. A file that the ledger does not know, one that was edited, a link, and a file of another
command are all foreign. They are refused (`ForeignFileError`), and no `--overwrite` lifts that.

1. A new file is written under a temporary name in the same folder and renamed once, so that a reader never sees half
   of it. The ledger learns the new digest before the rename: a process that is killed between the two leaves a file
   that the ledger still knows.
2. A new folder is made under a temporary name beside its place and renamed once (`new_folder`).
3. A folder is deleted only if every file in it is proved to be ours (`OwnedFolder.remove_tree`).

Cost: replacing a file reads it once for its digest, about a second per gigabyte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from gen2embed_mteb.errors import Gen2EmbedError

LEDGER = ".gen2embed-files.json"
LOCK = ".gen2embed-files.lock"
FORMAT = 1
MADE_BY = "gen2embed"
STALE_SECONDS = 3600
"""A temporary file or folder this old belongs to a process that was killed."""

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{12}\.gen2embed-tmp")


class ForeignFileError(Gen2EmbedError):
    """A file is in the way that we cannot prove to be ours; the message names it and the remedy."""

    @classmethod
    def of(cls, path: Path, reason: str) -> ForeignFileError:
        """Return the error for one file.

        Args:
            path: The file.
            reason: Why it is not ours, such as "was not written by gen2embed".
        """
        return cls(f"{path} {reason}, so it is not replaced or deleted; move it away, or choose another folder")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a new file so that readers see all of it or nothing; a file that is there must hold the same bytes.

    Args:
        path: The file; its folder must exist.
        data: The whole content.

    Raises:
        ForeignFileError: There is another file. To replace one of ours, use `OwnedFolder`.
    """
    if os.path.lexists(path):
        if _is_regular(path) and path.read_bytes() == data:
            return
        raise ForeignFileError.of(path, "holds something else than what is to be written")
    _put(path, data)


def set_aside(path: Path) -> Path:
    """Rename a file or folder that is in the way and that may be another's, so that nothing of it is lost.

    Args:
        path: The file or folder.

    Returns:
        Its new path, in the same folder: `NAME.set-aside-` and twelve hexadecimal digits.
    """
    kept = path.with_name(f"{path.name}.set-aside-{uuid.uuid4().hex[:12]}")
    path.rename(kept)
    return kept


def remove_proved(path: Path, sha256: str) -> bool:
    """Delete a file whose digest the caller knows from a marker of ours; any other file is left as it is.

    Args:
        path: The file.
        sha256: Of what we wrote, 64 hexadecimal digits.

    Returns:
        Whether it was deleted.
    """
    if not _is_regular(path) or sha256_of(path) != sha256:
        return False
    path.unlink()
    return True


def json_bytes(value: Any) -> bytes:
    """Return JSON as it is written everywhere: indented, keys in the order given, a newline at the end.

    Args:
        value: Anything that JSON can hold.

    Raises:
        ValueError: The value holds NaN or an infinity, which are no JSON.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A path may hold a lone surrogate; `\\udXXX` is how JSON writes it.
    return text.encode("utf-8", "backslashreplace")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Args:
        path: A regular file.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OwnedFolder:
    """A folder that we write into, and that may hold files of others.

    Args:
        path: The folder; made when the first file is written.
        writer: The command that writes, such as `sample`; files of another writer in the same folder are foreign.
    """

    def __init__(self, path: str | Path, writer: str) -> None:
        """Keep the arguments; nothing is read yet."""
        self.path = Path(path)
        self.writer = writer

    def owns(self, name: str) -> bool:
        """Say whether a file is there, is proved to be this writer's, and is unchanged.

        Args:
            name: Relative to the folder, with forward slashes.
        """
        return self._fault(name) is None and os.path.lexists(self.path / name)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return those of the names that the ledger knows and that are missing, or have another content now.

        Args:
            names: Relative to the folder, with forward slashes.
        """
        ledger = self._read()
        known = [name for name in names if name in ledger]
        return [name for name in known if not (self.path / name).is_file() or self._fault(name, ledger)]

    def known(self) -> list[str]:
        """Return the names of the files that this writer wrote here by the ledger, whether they are still there or not.

        Returns:
            Names relative to the folder, with forward slashes, in alphabetical order.
        """
        return sorted(name for name, entry in self._read().items() if entry["writer"] == self.writer)

    @contextlib.contextmanager
    def exclusive(self, patience: float = 15) -> Iterator[None]:
        """Let one process at a time of this writer into the folder.

        Args:
            patience: Seconds to wait for another; helpers of a killed process hold the lock for some seconds more.

        Raises:
            Gen2EmbedError: Another process is still in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(self.path / f".gen2embed-{self.writer}.lock").acquire(timeout=patience)
        except Timeout as error:
            raise Gen2EmbedError(
                f"another gen2embed {self.writer} is at work in {self.path}; wait for it, or choose another folder"
            ) from error
        with held:
            yield

    def check(self, names: Iterable[str], inputs: Sequence[str | Path] = ()) -> None:
        """Refuse files that may not be replaced; call it before any work is done.

        Args:
            names: The files that will be written.
            inputs: Files that the command reads; none of the names may be one of them.

        Raises:
            ForeignFileError: One of the files is foreign, or is an input.
        """
        given = {Path(path).expanduser().resolve() for path in inputs}
        ledger = self._read()
        for name in names:
            target = (self.path / name).resolve()
            if target in given:
                raise ForeignFileError.of(self.path / name, "is an input of this command")
            if fault := self._fault(name, ledger):
                raise ForeignFileError.of(self.path / name, fault)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file atomically: a new one, or in place of one of ours.

        Args:
            name: Relative to the folder, with forward slashes; missing folders are made.
            data: The whole content.

        Returns:
            The file's path.

        Raises:
            ForeignFileError: A foreign file of that name is there. One with the very same bytes is left as it is.
        """
        target = self._target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            digest = hashlib.sha256(data).hexdigest()
            if _is_regular(target) and target.stat().st_size == len(data) and target.read_bytes() == data:
                if len(self._read().get(name, {"sha256": []})["sha256"]) > 1:  # killed before it was noted
                    self._record({name: [digest]})
                return target
            self._announce({name: digest})
            _put(target, data)
            self._record({name: [digest]})
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as JSON; see `write` and `json_bytes`."""
        return self.write(name, json_bytes(value))

    def remove(self, name: str) -> bool:
        """Delete one of our files.

        Args:
            name: Relative to the folder, with forward slashes.

        Returns:
            Whether there was one.

        Raises:
            ForeignFileError: A foreign file of that name is there.
        """
        target = self._target(name)
        with self._locked():
            if not os.path.lexists(target):
                return False
            if fault := self._fault(name):
                raise ForeignFileError.of(target, fault)
            target.unlink()
            self._record({name: []})
        return True

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Make an empty temporary folder inside this one; it is deleted at the end, with what is left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        folder = _temporary(self.path / "scratch")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, scratch: Path, last: str = "") -> list[str]:
        """Move every file of a temporary folder here, in place of ours; nothing moves if one of them is foreign.

        The files of a folder that is adopted twice are replaced one by one. Where a reader must never see a mixture,
        name the file without which nothing can be read as `last`, or write a completion marker after this call.

        Args:
            scratch: A folder that `scratch` of this object made; files in folders of it keep their relative place.
            last: A file of it: the old one is deleted before anything moves, the new one moves after all others.

        Returns:
            The names, relative to this folder, with forward slashes.

        Raises:
            ForeignFileError: A foreign file is in the way.
        """
        found = (path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())
        names = sorted(name for name in found if name not in (LEDGER, LOCK))
        with self._locked():
            digests = {name: sha256_of(scratch / name) for name in names}
            self._announce(digests)
            if last in names and os.path.lexists(self._target(last)):
                self._target(last).unlink()  # proved to be ours by the line above
            for name in sorted(names, key=lambda name: name == last):
                target = self._target(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                (scratch / name).replace(target)
            self._record({name: [digest] for name, digest in digests.items()})
        return names

    def check_tree(self, name: str) -> None:
        """Refuse a folder in this one that holds a foreign file, as `remove_tree` does; nothing is written.

        Args:
            name: Relative to this folder, with forward slashes; there may be none.

        Raises:
            ForeignFileError: A file in it is not proved to be ours, or it is a link or a file.
        """
        root = self._target(name)
        if os.path.lexists(root) and (foreign := _foreign_in(root, self)) is not None:
            raise ForeignFileError.of(foreign, "was not written by gen2embed, or was changed since")

    def accept(self, name: str, data: bytes) -> None:
        """Note another content under which one of our files still counts as ours.

        Args:
            name: A file that this writer wrote.
            data: What another program, which writes the same model, may put there.
        """
        known = self._read().get(name)  # without the lock, whose file would stay in a folder that is complete
        if known is not None:
            self._record({name: list(dict.fromkeys([*known["sha256"], hashlib.sha256(data).hexdigest()]))})

    def remove_tree(self, name: str) -> bool:
        """Delete a folder in this one, if every file in it is proved to be ours by a ledger on the way to it.

        Args:
            name: Relative to this folder, with forward slashes.

        Returns:
            Whether there was one.

        Raises:
            ForeignFileError: It holds a foreign file; nothing was deleted then.
        """
        root = self._target(name)
        if not os.path.lexists(root):
            return False
        self.check_tree(name)
        # Renamed first: a deletion that is interrupted leaves no folder that looks whole.
        doomed = _temporary(root)
        root.replace(doomed)
        shutil.rmtree(doomed)
        with self._locked():
            inside = {known for known in self._read() if PurePosixPath(known).is_relative_to(name)}
            self._record({known: [] for known in inside})
        return True

    def _target(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or name in (LEDGER, LOCK):
            raise Gen2EmbedError(f"{name!r} is no name for a file in {self.path}; rename what it is called after")
        return self.path / name

    def _fault(
        self, name: str, ledger: dict[str, dict[str, Any]] | None = None, *, any_writer: bool = False
    ) -> str | None:
        """Why a file may not be replaced; None if it may, or if there is none."""
        target = self._target(name)
        if not os.path.lexists(target):
            return None
        if not _is_regular(target):
            return "is no regular file"
        entry = (self._read() if ledger is None else ledger).get(name)
        if entry is None:
            return "was not written by gen2embed"
        if entry["writer"] != self.writer and not any_writer:
            return f"was written by gen2embed {entry['writer']}, not by gen2embed {self.writer}"
        if sha256_of(target) not in entry["sha256"]:
            return "was changed since gen2embed wrote it"
        return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / LOCK):
            yield

    def _read(self) -> dict[str, dict[str, Any]]:
        """The ledger's entries by name; empty where there is no ledger that proves anything."""
        path = self.path / LEDGER
        try:
            if not _is_regular(path):
                return {}
            ledger = json.loads(path.read_bytes())
            if ledger["made_by"] != MADE_BY or ledger["format"] != FORMAT:
                return {}
            return {
                str(name): {"writer": str(entry["writer"]), "sha256": [str(digest) for digest in entry["sha256"]]}
                for name, entry in ledger["files"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _announce(self, digests: dict[str, str]) -> None:
        """Refuse foreign files, then note that these files may now be the old ones or the new ones."""
        ledger, digests_now = self._read(), {}
        for name, digest in digests.items():
            target = self._target(name)
            if fault := self._fault(name, ledger):
                raise ForeignFileError.of(target, fault)
            now = [sha256_of(target)] if os.path.lexists(target) else []
            digests_now[name] = [*now, digest]
        self._record(digests_now)

    def _record(self, digests: dict[str, list[str]]) -> None:
        from gen2embed_mteb import __version__

        path = self.path / LEDGER
        files = self._read()
        if os.path.lexists(path) and not files and not self._is_ours(path):
            raise ForeignFileError.of(path, "is no ledger of gen2embed")
        for name, listed in digests.items():
            if listed:
                files[name] = {"writer": self.writer, "sha256": listed}
            else:
                files.pop(name, None)
        ledger = {"made_by": MADE_BY, "format": FORMAT, "version": __version__, "files": dict(sorted(files.items()))}
        _put(path, json_bytes(ledger))

    @staticmethod
    def _is_ours(path: Path) -> bool:
        try:
            ledger = json.loads(path.read_bytes())
            return bool(ledger["made_by"] == MADE_BY and ledger["format"] == FORMAT)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@contextlib.contextmanager
def new_folder(target: Path, writer: str, token: str | None = None) -> Iterator[Path]:
    """Make a folder that appears whole: filled under a temporary name beside its place, then renamed once.

    The folder gets a ledger of all its files. Left by an exception, it is deleted, and `target` is as it was.

    Args:
        target: The folder; nothing may be there yet, but for an empty folder.
        writer: The command that writes, as in `OwnedFolder`.
        token: Of `new_token`, so that other processes find the temporary folder by `temporary_of` and write into it.

    Yields:
        The temporary folder, empty.

    Raises:
        ForeignFileError: Something is at `target`, before or at the end.
    """
    _require_vacant(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_of(target, token or new_token())
    folder.mkdir()
    try:
        yield folder
        _write_ledger(folder, writer)
        _require_vacant(target)
        folder.replace(target)  # onto an empty folder too; onto any other it fails
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def new_token() -> str:
    """Return twelve random hexadecimal digits, which tell temporary files of several processes apart."""
    return uuid.uuid4().hex[:12]


def temporary_of(path: Path, token: str) -> Path:
    """Return the temporary name, beside it, of a file or folder.

    Args:
        path: Its place in the end.
        token: Of `new_token`.
    """
    name = os.fsencode(path.name)[:160].decode("utf-8", "ignore")  # with what is added it must still be a name
    return path.with_name(f".{name}.{token}.gen2embed-tmp")


def is_whole(folder: Path, writer: str) -> bool:
    """Say whether a folder of `new_folder` still holds every file that was written, unchanged in size and digest.

    Args:
        folder: The folder.
        writer: Who wrote it.
    """
    return damage(folder, writer) is None


def damage(folder: Path, writer: str) -> str | None:
    """Return what is wrong with a folder of `new_folder`, or None where every file is as it was written.

    Args:
        folder: The folder.
        writer: Who wrote it.

    Returns:
        Such as "optimizer.pt is missing"; the first fault by name.
    """
    owned = OwnedFolder(folder, writer)
    names = owned.known()
    if not names:
        return f"it has no ledger of gen2embed {writer}"
    for name in names:
        if not os.path.lexists(folder / name):
            return f"{name} is missing"
        if fault := owned._fault(name):
            return f"{name} {fault}"
    return None


def write_in_scratch(path: Path, data: bytes) -> None:
    """Write a file in a temporary folder of ours, in place of one that a library wrote there.

    Args:
        path: A file below a folder of `OwnedFolder.scratch` or `new_folder`.
        data: The whole content.

    Raises:
        ForeignFileError: It is in no such folder.
    """
    if not any(_TEMPORARY.fullmatch(parent.name) for parent in path.absolute().parents):
        raise ForeignFileError.of(path, "is in no temporary folder of gen2embed")
    _put(path, data)


def require_vacant(target: Path) -> None:
    """Refuse a place for a new folder where something is already, but for an empty folder.

    Args:
        target: The place.

    Raises:
        ForeignFileError: Something is there.
    """
    _require_vacant(target)


def remove_stale(folder: Path, older_than: float = STALE_SECONDS) -> None:
    """Delete temporary files that killed processes left in a folder: those with our name, an hour old or more.

    Args:
        folder: The folder; files in folders of it are not looked at.
        older_than: Seconds; 0 only where `OwnedFolder.exclusive` keeps other processes out.
    """
    oldest = time.time() - older_than
    for path in folder.glob(".*.gen2embed-tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process may clean up, too
            if _TEMPORARY.fullmatch(path.name) and path.lstat().st_mtime <= oldest:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _require_vacant(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    raise ForeignFileError.of(target, "is not an empty folder" if target.is_dir() else "is there already")


def _write_ledger(folder: Path, writer: str) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    owned = OwnedFolder(folder, writer)
    owned._record({name: [sha256_of(folder / name)] for name in names if name not in (LEDGER, LOCK)})


def _foreign_in(root: Path, owner: OwnedFolder) -> Path | None:
    """The first file below `root` that neither the owner's ledger nor one further down proves to be ours."""
    if root.is_symlink() or not root.is_dir():
        return root
    ledgers: dict[Path, dict[str, dict[str, Any]]] = {}  # each is read once: they may list thousands of files
    for path in root.rglob("*"):
        if (path.is_dir() and not path.is_symlink()) or path.name in (LEDGER, LOCK):
            continue
        inner = [OwnedFolder(parent, owner.writer) for parent in path.parents if parent.is_relative_to(root)]
        for one in (owner, *inner):
            if one.path not in ledgers:
                ledgers[one.path] = one._read()
            name = path.relative_to(one.path).as_posix()
            if not one._fault(name, ledgers[one.path], any_writer=one is not owner):
                break
        else:
            return path
    return None


def _is_regular(path: Path) -> bool:
    """Whether a regular file is there; a link to one is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _temporary(path: Path) -> Path:
    """A new name beside a path: two processes may write the same file at once."""
    return temporary_of(path, new_token())


def _put(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is None:  # a full disk: say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
