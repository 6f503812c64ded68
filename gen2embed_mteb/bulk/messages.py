"""Messages between a run and its worker processes, over pipes: one JSON value, then the bytes of arrays.

    8 bytes     the length of the JSON text, little-endian
    JSON text   {"value": …, "arrays": [[name, dtype, shape], …]}
    bytes       of each array, in C order

Arrays are written from where they are and read into where they stay. Nothing that a worker sends is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

_LENGTH = 8


def write_message(file: IO[bytes], value: Any, arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
    """Write one message.

    Args:
        file: A pipe, not buffered.
        value: What JSON can hold; lone surrogates in texts survive.
        arrays: Arrays by name, of numbers.

    Raises:
        OSError: The other process has ended.
    """
    given = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    described = [[name, array.dtype.str, array.shape] for name, array in given.items()]
    text = json.dumps({"value": value, "arrays": described}).encode()
    _write(file, len(text).to_bytes(_LENGTH, "little") + text)
    for array in given.values():
        _write(file, array.reshape(-1).view(np.uint8).data)


def read_message(file: IO[bytes]) -> tuple[Any, Arrays]:
    """Read one message.

    Args:
        file: A pipe.

    Returns:
        The value, and the arrays by name.

    Raises:
        EOFError: The other process has ended.
    """
    length = int.from_bytes(_read(file, bytearray(_LENGTH)), "little")
    message = json.loads(bytes(_read(file, bytearray(length))))
    arrays: Arrays = {}
    for name, dtype, shape in message["arrays"]:
        kind = np.dtype(dtype)
        buffer = np.empty(math.prod(shape) * kind.itemsize, np.uint8)
        _read(file, buffer.data)
        arrays[name] = buffer.view(kind).reshape(shape)
    return message["value"], arrays


def _write(file: IO[bytes], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _read(file: Any, buffer: bytearray | memoryview) -> bytearray | memoryview:
    rest = memoryview(buffer)
    while rest:
        count = file.readinto(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return buffer
