"""What a shard of embeddings and its marker must be; what is not is damaged, and never used.

A marker is not believed. Whoever writes a file beside another one can write a digest, too: so the form, the number of
rows, the type and the norms are checked as well. An error of the system says nothing about a file and is passed on.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError  # of numpy, for a header without its closing bracket
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.storage.owned_folder import MADE_BY

FORMAT = 3
NORM_TOLERANCE = 1e-2
"""How far from 1 the norm of a row may be."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ROW = re.compile(r"0|[1-9][0-9]{0,9}")


class DamagedError(Exception):
    """A shard or its marker is not what we wrote; the message says why."""


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.

    Raises:
        DamagedError: A pipe, which could block, a device or a folder is there.
        OSError: The system cannot read it.
    """
    if os.path.lexists(path) and not path.is_file():
        raise DamagedError(f"{path.name} is no regular file")
    return path.read_bytes()


def parse_marker(data: bytes) -> dict[str, Any]:
    """Return a marker of exactly our form.

    Args:
        data: The file's content.

    Raises:
        DamagedError: It is anything else.
    """
    try:
        marker = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"its marker is no JSON: {error}") from error
    fault = "is no object" if not isinstance(marker, dict) else _marker_fault(marker)
    if fault:
        raise DamagedError(f"its marker {fault}")
    return dict(marker)


def _marker_fault(marker: dict[str, Any]) -> str:
    """Return what is wrong with a marker; empty if nothing is."""
    digests, counts = ("key", "identity", "sha256"), ("rows", "num_halvings")
    expected = {"made_by", "version", "format", "errors", *digests, *counts}
    if marker.keys() != expected:
        return f"has other entries than ours: {', '.join(sorted(expected ^ marker.keys()))}"
    if marker["made_by"] != MADE_BY or marker["format"] != FORMAT or not isinstance(marker["version"], str):
        return f"is not of gen2embed's format {FORMAT}"
    for name in digests:
        if not isinstance(marker[name], str) or not _DIGEST.fullmatch(marker[name]):
            return f"has no digest as {name}"
    for name in counts:
        if type(marker[name]) is not int or marker[name] < 0:
            return f"has no count as {name}"
    errors = marker["errors"]
    if not isinstance(errors, dict):
        return "has no object as errors"
    for row, fault in errors.items():
        if not _ROW.fullmatch(row) or int(row) >= marker["rows"]:
            return f"has an error for row {row!r}, which is none"
        if not (isinstance(fault, list) and len(fault) == 2 and all(isinstance(part, str) for part in fault)):
            return f"has no [file, reason] for row {row}"
    return ""


def parse_vectors(data: bytes) -> npt.NDArray[np.float32]:
    """Return the array of an `.npy` file as we write it; nothing is allocated that its header only claims.

    Args:
        data: The file's content.

    Returns:
        (rows, d) float32, a view of `data`.

    Raises:
        DamagedError: It holds anything else.
    """
    buffer = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(buffer) != (1, 0):
            raise DamagedError("it is of another version of the npy format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    except (ValueError, TypeError, SyntaxError, TokenError, EOFError, RecursionError, OverflowError) as error:
        raise DamagedError(f"it is no npy file: {error}") from error
    if dtype != np.dtype(np.float32) or fortran_order or [type(n) for n in shape] != [int, int] or min(shape) < 0:
        raise DamagedError(f"it holds {dtype} of shape {shape}, not rows of float32")
    offset = buffer.tell()
    if shape[0] * shape[1] * dtype.itemsize != len(data) - offset:
        raise DamagedError(f"it holds {len(data) - offset} bytes for shape {shape}")
    return np.frombuffer(data, np.float32, offset=offset).reshape(shape)


def check_norms(vectors: npt.NDArray[np.float32], errors: Mapping[int, tuple[str, str]]) -> None:
    """Hold rows to the encoder's contract: unit rows, and zeros where a row failed.

    Args:
        vectors: (rows, d) float32.
        errors: By row, why it failed.

    Raises:
        DamagedError: A row has another norm, or is not finite.
    """
    expected = np.ones(len(vectors))
    expected[list(errors)] = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - expected) <= NORM_TOLERANCE * expected))
    if wrong.size:
        row = int(wrong[0])
        raise DamagedError(f"row {row} has norm {norms[row]:.4g}, not {expected[row]:.0f}")
