"""Running a VLM2Vec script with this backbone: `python -m vlm2vec_adapter PATH/eval.py …`."""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.errors import Gen2EmbedError
from vlm2vec_adapter import BACKBONE, GENERATIONS
from vlm2vec_adapter.options import take_options, wants_us

logger = logging.getLogger(__name__)


def generation_of(script: Path) -> ModuleType:
    """Return the module for a script's generation, `v1` or `v2`.

    Args:
        script: VLM2Vec's `eval.py`, in its checkout.

    Raises:
        FileNotFoundError: There is no such script.
        ValueError: It is not in a checkout of VLM2Vec.
    """
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such file; pass the path of VLM2Vec's eval.py")
    for name, file in GENERATIONS.items():
        if (script.parent / file).is_file():
            return import_module(f"vlm2vec_adapter.scripts.{name}")
    raise Gen2EmbedError(
        f"{script.parent} is no checkout of VLM2Vec: none of {', '.join(GENERATIONS.values())} is there; "
        "git clone https://github.com/TIGER-AI-Lab/VLM2Vec (branch main is V2, branch v1 is v1)"
    )


def prepare(script: Path, arguments: Sequence[str]) -> None:
    """Add this backbone to VLM2Vec's own in this process, and set `sys.argv` for the script.

    Args:
        script: VLM2Vec's `eval.py`.
        arguments: VLM2Vec's flags and ours.

    Raises:
        FileNotFoundError: There is no such script.
        ValueError: An option cannot be used.
    """
    generation = generation_of(script)
    options, rest = take_options(arguments, os.environ)
    if not wants_us(rest):
        raise Gen2EmbedError(f"pass --model_backbone {BACKBONE}; for other backbones run {script} without the adapter")
    _log_to_stderr()
    _prepare_processes()
    folder = str(script.parent.resolve())
    sys.argv = [str(script), *rest]
    sys.path.insert(0, folder)  # what `python SCRIPT` does
    from vlm2vec_adapter.scripts.session import Session
    from vlm2vec_adapter.scripts.stubs import stubbed

    session = Session(options, generation.NAME, Share.from_environment(), generation.describe_datasets)
    with stubbed(generation.VENDORED):
        generation.install(session)


def run(script: Path) -> None:
    """Run a script of VLM2Vec, after `prepare`, as if by `python SCRIPT`.

    Raises:
        OutputMismatchError: Another configuration wrote the output folder.
        ImageError: Images cannot be used.
    """
    runpy.run_path(str(script), run_name="__main__")


def _prepare_processes() -> None:
    """Let data loaders fork their workers, which then share the replaced methods and the processor without a copy."""
    if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method("fork")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork


def _log_to_stderr() -> None:
    """Show our log messages whatever logging VLM2Vec sets up; only the first process shows all of them."""
    log = logging.getLogger(__package__)
    log.propagate = False
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("gen2embed: %(message)s"))
        log.addHandler(handler)
