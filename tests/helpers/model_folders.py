"""Copies of a model's folder with one thing changed, and a hub cache of exactly the hub's layout."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class WriteFile:
    """What a hostile pickle holds: unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        """Keep where the file will be."""
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def copied(source: Path, target: Path) -> Path:
    """Copy a folder, links followed, and return the copy."""
    shutil.copytree(source, target)
    return target


def edited(source: Path, target: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """Copy a folder with one JSON file changed in place by `change`; a missing file begins as `{}`."""
    copied(source, target)
    path = target / name
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return target


def reweighted(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Copy a folder with its weights changed in place by `change`."""
    copied(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def pickled(source: Path, target: Path, proof: Path) -> Path:
    """Copy a folder, its safetensors kept, with pickled weights that write `proof` when they are read."""
    copied(source, target)
    weights = load_file(target / "model.safetensors")
    torch.save({**weights, "proof": WriteFile(proof)}, target / "pytorch_model.bin")
    return target


def in_hub_cache(source: Path, cache: Path, hub_id: str) -> Path:
    """Put a folder into a hub cache: content in `blobs`, links to it in a snapshot, the commit in `refs`."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(path.relative_to(source).parts) + 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot
