"""The old place of `trainers.sampling.files`: programs may still import the names from here."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """Return a name of `trainers.sampling.files`."""
    return getattr(import_module("trainers.sampling.files"), name)
