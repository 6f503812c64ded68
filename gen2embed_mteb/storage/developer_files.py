"""Write the results of developers' tools: benchmarks and pretraining.

These commands replace the file that their `--output` names, which is in a checkout under git. Commands for users write
through `owned_folder.py`, which replaces only files that are proved to be ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gen2embed_mteb.storage.atomic import json_bytes, put


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the new one, even if the process is killed.

    Args:
        path: The file; its folder must exist.
        data: The whole content.
    """
    put(path, data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with keys in the given order.

    Args:
        path: The file; its folder must exist.
        value: Anything that JSON can hold; NaN is refused.

    Raises:
        ValueError: The value holds NaN or an infinity, which JSON cannot hold.
    """
    put(path, json_bytes(value))
