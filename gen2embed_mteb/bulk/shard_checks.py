"""Checks of a shard of embeddings and of its marker; a shard that fails them is damaged, and never used.

A marker alone is not trusted: whoever can replace a shard can also write a digest for it. So the form, the number of
rows, the type and the norms are checked as well. An error of the operating system says nothing about the file, so it is
passed to the caller.
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
"""The largest accepted difference of a row's norm from 1."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ROW = re.compile(r"0|[1-9][0-9]{0,9}")


class DamagedError(Exception):
    """The error for a shard or a marker that is not as we wrote it; the message says why."""


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.

    Raises:
        DamagedError: The path is a folder, a device, or a pipe, which could block.
        OSError: The system cannot read the file.
    """
    if os.path.lexists(path) and not path.is_file():
        raise DamagedError(f"{path.name} is no regular file")
    return path.read_bytes()


def parse_marker(data: bytes) -> dict[str, Any]:
    """Return a marker, if it has exactly our form.

    Args:
        data: The file's content.

    Raises:
        DamagedError: The marker has another form.
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
    """Return what is wrong with a marker; an empty string if nothing is."""
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
    """Return the array of an `.npy` file in our form; no memory is allocated for a size that only its header claims.

    Args:
        data: The file's content.

    Returns:
        (rows, d) float32, a view of `data`.

    Raises:
        DamagedError: The file holds anything else.
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
    """Check that every row has norm 1, and that a row that failed holds zeros.

    Args:
        vectors: (rows, d) float32.
        errors: The file and the reason for each row that failed, by row number.

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
