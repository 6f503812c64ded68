"""`python -m trainers.train`: `gen2embed train` for launchers such as `torchrun --nproc_per_node=8 -m trainers.train`.

`fine_tuning.py` does the work. It is imported only when the command runs: its libraries take seconds to load, and
Ctrl-C prints one line during that time, too.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

from gen2embed_mteb.errors import GO_ON_TRAINING, run_command
from gen2embed_mteb.launcher import end_with_launcher


def main(prog: str, module: str = "trainers.fine_tuning") -> None:
    """Train as the flags of the command line say, and end the process.

    Args:
        prog: The command as the user typed it.
        module: The module whose `run` does the work.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    end_with_launcher()

    def run() -> Any:
        return import_module(module).run(prog=prog)

    sys.exit(run_command(prog, run, go_on=GO_ON_TRAINING))


if __name__ == "__main__":
    main("python -m trainers.train")
