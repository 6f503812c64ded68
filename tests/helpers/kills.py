"""Kill a run of `gen2embed train` at its n-th operation on files, for every n, and compare what the resumed run leaves.

Each run is a fork of this process, which has the libraries loaded already: the whole sweep takes minutes, not hours.

    python tests/helpers/kills.py all OUTPUT_DIR FLAG…      every operation; FLAG… are those of `gen2embed train`
    python tests/helpers/kills.py some OUTPUT_DIR FLAG…     one operation of each kind
    python tests/helpers/kills.py full OUTPUT_DIR FLAG…     no kill: files may not grow beyond some size, then they may
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

import trainers.fine_tuning  # noqa: F401  # loaded once, before the forks
from gen2embed_mteb import cli

KILLED = 9
CREATING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
IGNORED = ("timing.json", ".gen2embed-files.lock", ".gen2embed-train.lock")
"""Times, and locks, which are empty."""


class Operations:
    """Counts this process's operations on files below a folder, and stops it at one of them.

    Args:
        folder: The folder.
        stop_at: The number of the operation, from 1, before which the process ends; 0: never.
        half: Whether a file that was to be opened for writing is left with a part of what was to be in it.
    """

    def __init__(self, folder: Path, stop_at: int = 0, *, half: bool = False) -> None:
        self.folder, self.stop_at, self.half = str(folder), stop_at, half
        self.names: list[str] = []

    def install(self) -> None:
        """Begins to count; an audit hook cannot be taken away again, so the process must end after the run."""
        sys.addaudithook(self._audit)
        # Both write from outside of Python, which no audit hook sees.
        for module, name, position in ((safetensors.torch, "save_file", 1), (torch, "save", 1)):
            setattr(module, name, self._counted(getattr(module, name), name, position))

    def _counted(self, stock: Callable, name: str, position: int) -> Callable:
        def call(*args, **kwargs):
            path = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
            if isinstance(path, str | os.PathLike):
                self._step(name, os.fspath(path), creates=True)
            return stock(*args, **kwargs)

        return call

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | os.PathLike) and flags & CREATING:
                self._step("open", os.fspath(path), creates=True)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            folder = args[2] if event in ("os.rename", "os.mkdir") else args[1]
            place = Path() if folder == -1 else Path(f"/proc/self/fd/{folder}").readlink()  # shutil.rmtree works so
            self._step(event, str(place / os.fsdecode(args[0])))

    def _step(self, event: str, path: str, *, creates: bool = False) -> None:
        if not path.startswith(self.folder) or path.endswith(".lock"):
            return
        self.names.append(f"{event} {path.removeprefix(self.folder)}")
        if len(self.names) == self.stop_at:
            if self.half and creates:
                descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
                os.write(descriptor, b'{"half')
            os._exit(KILLED)


def forked(run: Callable[[], int], errors: Path | None = None) -> int:
    """Runs something in a fork of this process, with what it prints in a file or nowhere; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(errors or os.devnull, os.O_WRONLY | os.O_CREAT, 0o644), 2)
            status = run()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(words: list[str], operations: Operations | None = None, names: Path | None = None) -> int:
    """Runs `gen2embed train` in a fork.

    Args:
        words: Its flags.
        operations: Counts, and stops it.
        names: Where to write what was counted.
    """

    def run() -> int:
        if operations is not None:
            operations.install()
        status = cli.main(["train", *words])
        if names is not None:
            names.write_text(json.dumps(operations.names))
        return status

    return forked(run)


def content(folder: Path) -> dict[str, str]:
    """The files below a folder by their digests; times, and the digest of their file, are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name + "/"] = ""
        elif path.name not in IGNORED:
            data = path.read_bytes()
            if path.name == ".gen2embed-files.json":
                ledger = json.loads(data)
                ledger["files"].pop("timing.json", None)
                data = json.dumps(ledger).encode()
            elif path.name == "results.json":
                data = re.sub(rb'"seconds": [\d.]+', b"", data)
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def differences(want: dict[str, str], got: dict[str, str]) -> list[str]:
    """The names of files that differ, or that one of the two lacks."""
    return sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))


def counted(output: Path, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Runs it undisturbed: its operations, and what it leaves."""
    names = output.with_suffix(".operations")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output, ignore_errors=True)
    assert train(words, Operations(output), names) == 0
    whole = content(output)
    shutil.rmtree(output)
    return json.loads(names.read_text()), whole


def killed_and_resumed(output: Path, words: list[str], number: int, *, half: bool = False) -> dict[str, str]:
    """Kills a run at an operation, starts it again, and says what is left."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(output)
    assert train(words, Operations(output, number, half=half)) == KILLED
    assert train([*words, "--resume_from_checkpoint", "true"]) == 0, f"operation {number}: cannot be resumed"
    return content(output)


KINDS = (
    r"os.rename /\.train\.json",
    r"save /\.checkpoint-\d+\.\w+\.gen2embed-tmp/optimizer\.pt",
    r"open /\.checkpoint-\d+\.\w+\.gen2embed-tmp/trainer_state\.json",
    r"os.rename /\.checkpoint-\d+\.",
    r"os.rename /checkpoint-\d+$",
    r"os.remove ",
    r"save_file /\.scratch\.\w+\.gen2embed-tmp/",
    r"os.rename /\.scratch\.\w+\.gen2embed-tmp/m",
)
"""One operation of each kind: records, the files of a checkpoint, its appearance and deletion, the final model."""


def chosen(names: list[str]) -> list[int]:
    """The numbers of the last operation of each kind, and of the very last one."""
    found = [max((n for n, name in enumerate(names, 1) if re.match(kind, name)), default=0) for kind in KINDS]
    assert all(found), [kind for kind, number in zip(KINDS, found, strict=True) if not number]
    return [*found, len(names)]


def sweep(output: Path, words: list[str], *, everything: bool) -> int:
    """Kills at every operation, or at one of each kind; returns how many runs ended otherwise."""
    names, whole = counted(output, words)
    failed, numbers = 0, list(range(1, len(names) + 1)) if everything else chosen(names)
    for number in numbers:
        creates = names[number - 1].startswith(("open", "save"))
        for half in (False, True) if everything and creates else (creates,):
            try:
                wrong = differences(whole, killed_and_resumed(output, words, number, half=half))
            except AssertionError as error:
                wrong = [str(error)]
            failed += bool(wrong)
            say(f"{number} {'half ' if half else ''}{names[number - 1]}: {wrong or 'same'}")
    say(f"{failed} of {len(numbers)} operations end otherwise")
    return failed


def fill(output: Path, words: list[str]) -> int:
    """Lets no file grow beyond some size, as on a full disk, then goes on; returns how many runs ended otherwise."""
    _, whole = counted(output, words)
    failed = 0
    for size in (1_000, 20_000, 60_000, 300_000):
        shutil.rmtree(output, ignore_errors=True)

        def limited(size: int = size) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return cli.main(["train", *words])

        errors = output.with_suffix(f".{size}.err")
        status = forked(limited, errors)
        lines = [line for line in errors.read_text().splitlines() if "error: " in line]
        said = len(lines) == 1 and "free space on that disk, then run the same command again" in lines[0]
        half = [path.name for path in output.rglob("*.gen2embed-tmp")]
        resumed = train([*words, "--resume_from_checkpoint", "true"])
        wrong = differences(whole, content(output))
        failed += bool(status != 2 or not said or "Traceback" in errors.read_text() or half or resumed or wrong)
        say(f"{size}: status {status}, {lines}, left {half}, resumed {resumed}, {wrong or 'same'}")
    return failed


def say(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    mode, output, *flags = sys.argv[1:]
    words = [*flags, "--output_dir", output]
    if mode == "full":
        sys.exit(fill(Path(output), words) > 0)
    sys.exit(sweep(Path(output), words, everything=mode == "all") > 0)
