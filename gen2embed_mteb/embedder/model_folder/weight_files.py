"""Names, types and shapes of the tensors in safetensors files, read from the headers without reading a weight."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.errors import Gen2EmbedError

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors library."""


class ModelFolderError(Gen2EmbedError):
    """A file of a model's or an adapter's folder cannot be used; the message names the file and the remedy."""


class Tensor(NamedTuple):
    """One entry of a header: the type and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return names, types and shapes of the tensors in a safetensors file.

    Raises:
        ModelFolderError: The file is not a complete safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise Gen2EmbedError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        tensors = {
            name: Tensor(entry["dtype"], tuple(map(int, entry["shape"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if size != 8 + length + end:
            raise Gen2EmbedError(f"it has {size} bytes, its header promises {8 + length + end}")
        if any(number < 0 for tensor in tensors.values() for number in tensor.shape):
            raise Gen2EmbedError("a shape has a negative number")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, struct.error) as error:
        reason = str(error) if isinstance(error, Gen2EmbedError) else f"{type(error).__name__}: {error}"
        raise ModelFolderError(f"{path}: not a whole safetensors file ({reason}); copy or download it again") from error
    return tensors


def read_index(folder: Path) -> dict[str, Any] | None:
    """Return the content of a checked index of weight files; `None` if there is none."""
    path = folder / INDEX_FILE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def weight_files(folder: Path, index: Mapping[str, Any] | None = None) -> list[Path]:
    """Return the files that hold a model's weights: `model.safetensors`, or else the files that its index names.

    Args:
        folder: The model's folder.
        index: The content of `model.safetensors.index.json`, if there is one.

    Raises:
        ModelFolderError: There is neither, or the index names something other than files of the folder.
    """
    single = folder / WEIGHTS_FILE
    if single.is_file():
        return [single]
    if index is None:
        pickled = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        found = f"{pickled} is pickled, and pickles can run code: it is not read" if pickled else "no weights"
        raise ModelFolderError(
            f'{single} not found ({found}); convert the weights: python -c "from transformers import '
            f"AutoModelForImageTextToText as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelFolderError(f"{folder / INDEX_FILE}: no weight_map from names to files; download it again")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFolderError(f"{folder / INDEX_FILE}: {name!r} is not the name of a safetensors file beside it")
    return [folder / name for name in files]


def read_headers(folder: Path, index: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return the tensors of all weight files of a folder; the arguments are those of `weight_files`.

    Raises:
        ModelFolderError: A file is missing or damaged, or for the reasons that `weight_files` names.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, index):
        if not path.is_file():
            raise ModelFolderError(f"{path} not found, but {INDEX_FILE} names it; copy or download it again")
        tensors.update(read_header(path))
    if index is not None and not (folder / WEIGHTS_FILE).is_file():
        lost = sorted(set(index["weight_map"]) - set(tensors))
        if lost:
            raise ModelFolderError(f"{folder / INDEX_FILE}: {len(lost)} tensors are in no file, {lost[0]} first")
    return tensors
