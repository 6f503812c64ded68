"""One thread at a time runs what changes shared settings for the time of a call.

- A model whose parts are exchanged while it generates: its forward pass (`readouts/readout.py`).
- A fast tokenizer of transformers: each call sets padding, truncation, and whether control tokens are read as plain
  text, on the one backend, and then encodes. Between the two, a call of another thread could set something else:
  control tokens of a prompt would be split into letters, and the vectors would be wrong without an error.
"""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

_ENCODE = "_encode_plus"
"""The method of a tokenizer through which all others encode."""


class Lock:
    """A lock that the thread that holds it may take again; a copy of a model gets a new one."""

    def __init__(self) -> None:
        """Make an open lock."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lock:
        return Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


class LockedCall:
    """A method of an object, which waits while another thread has the lock.

    Args:
        owner: The object; its class's method is run.
        name: The method's name.
        lock: The lock.
    """

    def __init__(self, owner: Any, name: str, lock: Lock) -> None:
        """Take the method's signature, which others inspect."""
        self._owner, self._name, self._lock = owner, name, lock
        functools.update_wrapper(self, functools.partial(getattr(type(owner), name), owner), assigned=(), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method when no other thread has the lock."""
        with self._lock:
            return getattr(type(self._owner), self._name)(self._owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LockedCall:
        return LockedCall(copy.deepcopy(self._owner, memo), self._name, copy.deepcopy(self._lock, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return LockedCall, (self._owner, self._name, self._lock)


def lock_tokenizer(tokenizer: Any) -> None:
    """Let a tokenizer encode for one thread at a time; a copy of it has a lock of its own.

    Args:
        tokenizer: A fast tokenizer of transformers, locked or not; others keep no settings between calls.
    """
    if hasattr(tokenizer, _ENCODE):
        vars(tokenizer)[_ENCODE] = LockedCall(tokenizer, _ENCODE, Lock())
