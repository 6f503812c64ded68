"""Switching plain `python eval.py --model_backbone gen2embed …` on and off.

`enable` puts one `.pth` file into the environment's site-packages, `disable` deletes it; nothing else is changed.
Python reads such a file whenever it starts. Ours reads the command line, and imports this module only if the line
mentions this backbone. This module then replaces the process by `python -m vlm2vec_adapter eval.py …`, with the same
process id and the same flags. So scripts always run in the same way, also under `torchrun`, and a program that is not
VLM2Vec's evaluation runs as if this package were not installed.

This module imports only a small part of the standard library, since it runs before the program.
"""

import os
import sys
from pathlib import Path

from vlm2vec_adapter import BACKBONE, GENERATIONS
from vlm2vec_adapter.options import wants_us

FILE = "gen2embed_vlm2vec.pth"
OPT_OUT = "GEN2EMBED_NO_HOOK"

LINES = f"""\
# Written by `python -m vlm2vec_adapter enable`, deleted by `disable`: lets VLM2Vec's plain
# `python eval.py --model_backbone {BACKBONE} ...` run a Gen2Embed model. {OPT_OUT}=1 switches it off for one run.
import sys; exec("if '{BACKBONE}' in ' '.join(sys.orig_argv):\\n try:\\n  import {__package__}.startup as s\\n\
 except ImportError:\\n  pass\\n else:\\n  s.start()")
"""

WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")
"""The interpreter's own flags whose value is the next word."""


def start() -> None:
    """Restart through the adapter if this is VLM2Vec's evaluation with this backbone; otherwise do nothing."""
    command = command_for(sys.orig_argv) if os.environ.get(OPT_OUT, "") in ("", "0") else None
    if command is not None:
        os.execv(sys.executable, [sys.executable, *command])  # noqa: S606  # no shell: the words are passed unchanged


def command_for(words: list[str]) -> list[str] | None:
    """Return the command line with the adapter before the script.

    Args:
        words: A command line in the form of `sys.orig_argv`, the interpreter first.

    Returns:
        The words after the interpreter; `None` if it does not run a script of VLM2Vec with this backbone.
    """
    place = _place_of_script(words)
    if place is None or not wants_us(words[place + 1 :]):
        return None
    script = Path(words[place])
    if script.suffix != ".py" or not any((script.parent / known).is_file() for known in GENERATIONS.values()):
        return None
    return [*words[1:place], "-m", __package__, *words[place:]]


def _place_of_script(words: list[str]) -> int | None:
    """Return the index of the script; `None` with `-c` or `-m`, or if the program is read from elsewhere."""
    place = 1
    while place < len(words) and words[place].startswith("-"):
        flag = words[place]
        if flag == "-" or (not flag.startswith("--") and flag[-1] in "cm"):
            return None
        place += 2 if flag in WITH_VALUE else 1
    return place if place < len(words) else None


def enable() -> Path:
    """Write the start-up file.

    Returns:
        The path of the file.

    Raises:
        ForeignFileError: Another file has that name.
        PermissionError: Site-packages cannot be written.
        ValueError: This package is not installed, so that a starting interpreter would not find it.
    """
    import subprocess

    probe = [sys.executable, "-P", "-c", f"import {__package__}"]
    found = subprocess.run(probe, cwd=Path(sys.prefix), capture_output=True, check=False)  # noqa: S603
    if found.returncode:
        from gen2embed_mteb.errors import Gen2EmbedError

        raise Gen2EmbedError(
            f"{__package__} is not installed in {sys.prefix}: run pip install in Gen2Embed's checkout first"
        )
    path = _path()
    from gen2embed_mteb.storage.atomic import write_atomic

    try:
        write_atomic(path, LINES.encode())
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be written; use an environment of your own (python -m venv)") from error
    return path


def disable() -> Path | None:
    """Delete the start-up file, if its bytes are those that `enable` writes.

    Returns:
        The path of the deleted file; `None` if there was none.

    Raises:
        ForeignFileError: Another file has that name.
    """
    import hashlib

    from gen2embed_mteb.storage.atomic import ForeignFileError, remove_proved

    path = _path()
    if not os.path.lexists(path):
        return None
    if not remove_proved(path, hashlib.sha256(LINES.encode()).hexdigest()):
        raise ForeignFileError.of(path, "is not the file that `enable` writes")
    return path


def _path() -> Path:
    import sysconfig

    return Path(sysconfig.get_path("purelib")) / FILE
