"""A folder that we write into and that may hold files of others; only files that are proved to be ours are replaced.

The rule: we replace or delete a file only if we can prove that we wrote it and that nobody changed it since. The proof
is the ledger `.gen2embed-files.json` in the folder: it holds our name, our version, and for every file its SHA-256 and
the command that wrote it. A file that is not in the ledger, a file that was edited, a link, and a file of another
command are all foreign. They are refused (`ForeignFileError`), and no `--overwrite` changes that.

1. A new file is written under a temporary name in the same folder and renamed once. The new digest is recorded in the
   ledger before the rename: if a process is killed between the two, the ledger still proves the file.
2. A folder is deleted only if every file in it is proved to be ours (`OwnedFolder.remove_tree`).

Cost: replacing a file reads it once for its digest, about a second per gigabyte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import ForeignFileError, is_regular, json_bytes, new_temporary, put, sha256_of
from gen2embed_mteb.version import __version__

LEDGER = ".gen2embed-files.json"
LOCK = ".gen2embed-files.lock"
FORMAT = 1
MADE_BY = "gen2embed"


class OwnedFolder:
    """A folder that we write into, and that may hold files of others.

    Args:
        path: The folder; it is created when the first file is written.
        writer: The command that writes, such as `sample`; files of another writer in the same folder are foreign.
    """

    def __init__(self, path: str | Path, writer: str) -> None:
        """Keep the arguments; nothing is read yet."""
        self.path = Path(path)
        self.writer = writer

    def owns(self, name: str) -> bool:
        """Return whether a file exists, is proved to be this writer's, and is unchanged.

        Args:
            name: Its path relative to the folder, with forward slashes.
        """
        return self.fault(name) is None and os.path.lexists(self.path / name)

    def changed(self, names: Iterable[str]) -> list[str]:
        """Return those names that are in the ledger, but whose files are missing or have another content now.

        Args:
            names: Paths relative to the folder, with forward slashes.
        """
        ledger = self.read_ledger()
        known = [name for name in names if name in ledger]
        return [name for name in known if not (self.path / name).is_file() or self.fault(name, ledger)]

    def known(self) -> list[str]:
        """Return the names of the files that this writer wrote here by the ledger, whether they still exist or not.

        Returns:
            Names relative to the folder, with forward slashes, in alphabetical order.
        """
        return sorted(name for name, entry in self.read_ledger().items() if entry["writer"] == self.writer)

    @contextlib.contextmanager
    def exclusive(self, patience: float = 15) -> Iterator[None]:
        """Lock the folder, so that only one process of this writer works in it at a time.

        Args:
            patience: Seconds to wait for another process; child processes of a killed one may hold the lock for some
                seconds longer.

        Raises:
            Gen2EmbedError: Another process still holds the lock.
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
            inputs: Files that the command reads; it must not write any of them.

        Raises:
            ForeignFileError: One of the files is foreign, or is an input.
        """
        given = {Path(path).expanduser().resolve() for path in inputs}
        ledger = self.read_ledger()
        for name in names:
            target = (self.path / name).resolve()
            if target in given:
                raise ForeignFileError.of(self.path / name, "is an input of this command")
            if fault := self.fault(name, ledger):
                raise ForeignFileError.of(self.path / name, fault)

    def write(self, name: str, data: bytes) -> Path:
        """Write a file atomically; it may replace one of ours.

        Args:
            name: Its path relative to the folder, with forward slashes; missing subfolders are created.
            data: The whole content.

        Returns:
            The file's path.

        Raises:
            ForeignFileError: A foreign file has that name, with other content. One with the same bytes stays as it is.
        """
        target = self._target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            digest = hashlib.sha256(data).hexdigest()
            if is_regular(target) and target.stat().st_size == len(data) and target.read_bytes() == data:
                if len(self.read_ledger().get(name, {"sha256": []})["sha256"]) > 1:  # killed before `record`
                    self.record({name: [digest]})
                return target
            self._announce({name: digest})
            put(target, data)
            self.record({name: [digest]})
        return target

    def write_json(self, name: str, value: Any) -> Path:
        """Write a value as JSON; see `write` and `json_bytes`."""
        return self.write(name, json_bytes(value))

    def remove(self, name: str) -> bool:
        """Delete one of our files.

        Args:
            name: Its path relative to the folder, with forward slashes.

        Returns:
            Whether the file existed.

        Raises:
            ForeignFileError: A foreign file has that name.
        """
        target = self._target(name)
        with self._locked():
            if not os.path.lexists(target):
                return False
            if fault := self.fault(name):
                raise ForeignFileError.of(target, fault)
            target.unlink()
            self.record({name: []})
        return True

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty temporary folder inside this one; it is deleted at the end, with all files left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        folder = new_temporary(self.path / "scratch")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adopt(self, scratch: Path, last: str = "") -> list[str]:
        """Move every file of a temporary folder here, in place of ours; none moves if one would replace a foreign file.

        When a second folder is moved here, files are replaced one by one. If a reader must never see a mixture of old
        and new files, pass as `last` the file without which nothing can be read, or write a completion marker after
        this call.

        Args:
            scratch: A folder that `scratch` of this object made; files in its subfolders keep their relative path.
            last: One of its files: the old one is deleted before any file moves, the new one moves after all others.

        Returns:
            The names, relative to this folder, with forward slashes.

        Raises:
            ForeignFileError: A foreign file would be replaced.
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
            self.record({name: [digest] for name, digest in digests.items()})
        return names

    def check_tree(self, name: str) -> None:
        """Refuse a subfolder that holds a foreign file, as `remove_tree` does, without changing anything.

        Args:
            name: Its path relative to this folder, with forward slashes; it may be missing.

        Raises:
            ForeignFileError: A file in it is not proved to be ours, or `name` is a link or a file.
        """
        root = self._target(name)
        if os.path.lexists(root) and (foreign := _foreign_in(root, self)) is not None:
            raise ForeignFileError.of(foreign, "was not written by gen2embed, or was changed since")

    def accept(self, name: str, data: bytes) -> None:
        """Record another content with which one of our files still counts as ours.

        Args:
            name: A file that this writer wrote.
            data: The content that another program, which writes the same model, may write there.
        """
        known = self.read_ledger().get(name)  # without the lock, whose file would remain in a complete folder
        if known is not None:
            self.record({name: list(dict.fromkeys([*known["sha256"], hashlib.sha256(data).hexdigest()]))})

    def remove_tree(self, name: str) -> bool:
        """Delete a subfolder, if a ledger here or in one of its folders proves every file in it to be ours.

        Args:
            name: Its path relative to this folder, with forward slashes.

        Returns:
            Whether the subfolder existed.

        Raises:
            ForeignFileError: It holds a foreign file; in that case nothing is deleted.
        """
        root = self._target(name)
        if not os.path.lexists(root):
            return False
        self.check_tree(name)
        # Rename first: then an interrupted deletion leaves no folder that looks complete.
        doomed = new_temporary(root)
        root.replace(doomed)
        shutil.rmtree(doomed)
        with self._locked():
            inside = {known for known in self.read_ledger() if PurePosixPath(known).is_relative_to(name)}
            self.record({known: [] for known in inside})
        return True

    def _target(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or name in (LEDGER, LOCK):
            raise Gen2EmbedError(f"{name!r} is no name for a file in {self.path}; rename what it is called after")
        return self.path / name

    def fault(
        self, name: str, ledger: dict[str, dict[str, Any]] | None = None, *, any_writer: bool = False
    ) -> str | None:
        """Return the reason why a file may not be replaced; None if it may be, or if it does not exist."""
        target = self._target(name)
        if not os.path.lexists(target):
            return None
        if not is_regular(target):
            return "is no regular file"
        entry = (self.read_ledger() if ledger is None else ledger).get(name)
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

    def read_ledger(self) -> dict[str, dict[str, Any]]:
        """Return the ledger's entries by name; empty if there is no valid ledger."""
        path = self.path / LEDGER
        try:
            if not is_regular(path):
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
        """Refuse foreign files, then record that these files may now have the old content or the new one."""
        ledger, digests_now = self.read_ledger(), {}
        for name, digest in digests.items():
            target = self._target(name)
            if fault := self.fault(name, ledger):
                raise ForeignFileError.of(target, fault)
            now = [sha256_of(target)] if os.path.lexists(target) else []
            digests_now[name] = [*now, digest]
        self.record(digests_now)

    def record(self, digests: dict[str, list[str]]) -> None:
        """Record in the ledger which files this writer wrote or deleted.

        Args:
            digests: The SHA-256 digests that a file may have now, by its name; an empty list for a deleted file.

        Raises:
            ForeignFileError: A file that is not a ledger of ours has the ledger's name.
        """
        path = self.path / LEDGER
        files = self.read_ledger()
        if os.path.lexists(path) and not files and not self._is_ours(path):
            raise ForeignFileError.of(path, "is no ledger of gen2embed")
        for name, listed in digests.items():
            if listed:
                files[name] = {"writer": self.writer, "sha256": listed}
            else:
                files.pop(name, None)
        ledger = {"made_by": MADE_BY, "format": FORMAT, "version": __version__, "files": dict(sorted(files.items()))}
        put(path, json_bytes(ledger))

    @staticmethod
    def _is_ours(path: Path) -> bool:
        try:
            ledger = json.loads(path.read_bytes())
            return bool(ledger["made_by"] == MADE_BY and ledger["format"] == FORMAT)
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _foreign_in(root: Path, owner: OwnedFolder) -> Path | None:
    """Return the first file below `root` that neither the owner's ledger nor a ledger below it proves to be ours."""
    if root.is_symlink() or not root.is_dir():
        return root
    ledgers: dict[Path, dict[str, dict[str, Any]]] = {}  # each is read once, as it may list thousands of files
    for path in root.rglob("*"):
        if (path.is_dir() and not path.is_symlink()) or path.name in (LEDGER, LOCK):
            continue
        inner = [OwnedFolder(parent, owner.writer) for parent in path.parents if parent.is_relative_to(root)]
        for one in (owner, *inner):
            if one.path not in ledgers:
                ledgers[one.path] = one.read_ledger()
            name = path.relative_to(one.path).as_posix()
            if not one.fault(name, ledgers[one.path], any_writer=one is not owner):
                break
        else:
            return path
    return None
