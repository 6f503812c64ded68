"""One thread at a time runs a model whose parts are exchanged while it generates."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any


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


class LockedForward:
    """The forward pass of a model, which waits while another thread has the model's lock.

    Args:
        model: The model; its class's forward pass is run.
        lock: The lock.
    """

    def __init__(self, model: Any, lock: Lock) -> None:
        """Take the signature of the model's forward pass, which others inspect."""
        self._model, self._lock = model, lock
        functools.update_wrapper(self, functools.partial(type(model).forward, model), assigned=(), updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass when no other thread has the lock."""
        with self._lock:
            return type(self._model).forward(self._model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> LockedForward:
        return LockedForward(copy.deepcopy(self._model, memo), copy.deepcopy(self._lock, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return LockedForward, (self._model, self._lock)
