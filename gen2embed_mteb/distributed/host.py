"""What runs in a process that Ray starts: it makes a worker when one is needed, and hands jobs on."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from importlib import import_module
from typing import Any


class Host:
    """Holds a worker.

    Args:
        factory: What makes the worker, as `module:function`; it is imported here, after the environment is set.
        arguments: The arguments of that function.
        environment: Variables that are set in this process, if they are not set yet.
        folder: The driver's working folder, so that relative paths mean the same; ignored where it does not exist.
    """

    def __init__(self, factory: str, arguments: Mapping[str, Any], environment: Mapping[str, str], folder: str) -> None:
        """Keep the arguments; errors in a constructor would reach the driver as text alone."""
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        self._factory, self._arguments = factory, arguments
        self._worker: Any = None
        self._runner: Any = None

    def prepare(self, setup: Any) -> str:
        """Prepare for the jobs that follow, and return where this process runs.

        Args:
            setup: Its `open` returns what runs the jobs; it is given a function that returns the worker.
        """
        self._runner = setup.open(self._made_worker)
        return f"{socket.gethostname()}:{os.getpid()}"

    def run(self, job: Any) -> Any:
        """Do a job."""
        return self._runner.run(job)

    def _made_worker(self) -> Any:
        if self._worker is None:
            module, _, function = self._factory.partition(":")
            self._worker = getattr(import_module(module), function)(**self._arguments)
        return self._worker
