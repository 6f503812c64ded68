"""VLM2Vec's files of vectors: a digest is computed while VLM2Vec writes them, and compared before it unpickles them.

VLM2Vec stores vectors as pickles, `{S}_qry` and `{S}_tgt`, and unpickles any file of that name: a file that another
person put into the folder could run any code. In this process `pickle.dump` and `pickle.load` are replaced, but only
for such files in one folder:

1. `dump` records the SHA-256 of what it writes.
2. `load` refuses a file whose digest is not recorded, before any byte of it is unpickled.
3. `load` builds arrays, texts, numbers and containers of them, and refuses every other class or function.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypedDict

from gen2embed_mteb.errors import Gen2EmbedError

VECTORS = ("_qry", "_tgt")
"""The ends of the names of VLM2Vec's files of vectors, in both generations."""

_MULTIARRAY = {f"numpy.{core}.multiarray" for core in ("core", "_core")}
_NUMERIC = {f"numpy.{core}.numeric" for core in ("core", "_core")}
ALLOWED = frozenset(
    {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    | {(module, name) for module in _MULTIARRAY for name in ("_reconstruct", "scalar")}
    | {(module, "_frombuffer") for module in _NUMERIC}
)
"""The functions and classes that a pickle of arrays needs, in every version of numpy."""


class VectorFileError(Gen2EmbedError):
    """The error for a file of vectors that we did not write, or that was changed since; it was not unpickled."""


class FileEntry(TypedDict):
    """The record of a file: the SHA-256 and the number of its bytes, and the number of its rows of vectors."""

    sha256: str
    size: int
    rows: int


class VectorFiles:
    """The files of vectors in one folder.

    Args:
        folder: The folder that VLM2Vec writes to.
        known: Returns the recorded entry of a file, by its name; `None` if there is none.
        note: Records the entry of a file.
    """

    def __init__(
        self, folder: Path, known: Callable[[str], FileEntry | None], note: Callable[[str, FileEntry], None]
    ) -> None:
        """Keep the arguments."""
        self._folder = folder.resolve()
        self._known = known
        self._note = note

    def install(self) -> None:
        """Replace `pickle.dump` and `pickle.load` in this process; only files of vectors are treated differently."""
        stock_dump, stock_load = pickle.dump, pickle.load

        @wraps(stock_dump)
        def dump(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            name = self._name(file)
            if name is None:
                stock_dump(value, file, *args, **kwargs)
                return
            counted = _Digesting(file)
            stock_dump(value, counted, *args, **kwargs)
            rows = len(value[0] if isinstance(value, tuple) else value)
            self._note(name, {"sha256": counted.digest.hexdigest(), "size": counted.size, "rows": rows})

        @wraps(stock_load)
        def load(file: Any, *args: Any, **kwargs: Any) -> Any:
            name = self._name(file)
            if name is None:
                return stock_load(file, *args, **kwargs)
            start = file.tell()
            found = hashlib.file_digest(file, "sha256").hexdigest()
            entry = self._known(name)
            if entry is None or entry["sha256"] != found:
                raise VectorFileError(
                    f"{self._folder / name} is not what this project wrote, so it is not unpickled; "
                    "name another --encode_output_path"
                )
            file.seek(start)
            return _VectorUnpickler(file, self._folder / name).load()

        pickle.dump, pickle.load = dump, load  # type: ignore[assignment]

    def _name(self, file: Any) -> str | None:
        """Return the name of a file of vectors in this folder; `None` for every other file."""
        name = getattr(file, "name", None)
        if not isinstance(name, (str, os.PathLike)):
            return None
        path = Path(name)
        return path.name if path.name.endswith(VECTORS) and path.parent.resolve() == self._folder else None


class _Digesting:
    """An output file that also computes the digest of what is written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> Any:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)


class _VectorUnpickler(pickle.Unpickler):
    """An unpickler that builds only arrays and plain values."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise VectorFileError(
                f"{self._path} asks for {module}.{name}, which no file of vectors needs, so it is not unpickled; "
                "name another --encode_output_path"
            )
        return super().find_class(module, name)
