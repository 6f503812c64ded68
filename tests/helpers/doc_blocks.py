"""Reads the code blocks of README, docs and notebooks, and runs them.

    python tests/helpers/doc_blocks.py FOLDER PAGE…

A block is run unless the line before it says why not: `<!-- not run: needs a GPU -->`. A block of text below
`<!-- output -->` is what the block before it prints; `…` stands for anything.

Importing the libraries takes longer than most blocks. So one process imports them, and each page is run in a fork of
it: in a folder of its own, its blocks in order. `gen2embed`, `mteb` and `python -m` are called by their functions;
every other command goes to bash. MMEB-mini is drawn with few rows, once for all pages.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN = ("python", "bash")
PLAIN = ("text", "json", "toml", "yaml", "bibtex", "jinja")
"""Languages of blocks that are no code to run."""

_LONGEST = 300
"""Seconds that a page may take; far above what any takes."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n`]*\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: ((?:(?!-->).)+) -->\n+\Z", re.S)
_OUTPUT = re.compile(r"<!-- output -->\n+\Z")
_MAINS = {
    ("gen2embed",): "gen2embed_mteb.cli",
    ("python", "-m", "gen2embed_mteb.cli"): "gen2embed_mteb.cli",
    ("python", "-m", "vlm2vec_adapter"): "vlm2vec_adapter.__main__",
}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: its file, from the root.
        line: where its code begins.
        language: what stands behind the fence.
        code: its text.
        reason: why it is not run; empty if it is.
        is_output: whether it is what the block before it prints.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str = ""
    is_output: bool = False


def pages() -> list[str]:
    """Everything that users and contributors read, but the changelog."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in [*found, *(ROOT / "examples").glob("*.ipynb")])


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page or the code cells of a notebook."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return [Block(page, number, "python", "".join(cell["source"])) for number, cell in enumerate(cells, 1)]
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        said = _NOT_RUN.search(before)
        found.append(
            Block(
                page,
                before.count("\n") + 2,
                match["language"],
                re.sub(rf"^{match['indent']}", "", match["code"], flags=re.M),
                said[1] if said else "",
                bool(_OUTPUT.search(before)),
            )
        )
    return found


def run_pages(folder: Path, wanted: list[str]) -> None:
    """Run pages and write `FOLDER/NUMBER.json` for each: what every block printed, and what went wrong."""
    os.environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TQDM_DISABLE"] = "1"
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)  # nothing may have started threads when a process forks
    draw_small(folder)
    for name in ("gen2embed_mteb.cli", "trainers.train", "sentence_transformers", "mteb", "vlm2vec_adapter.__main__"):
        importlib.import_module(name)
    from gen2embed_mteb import Gen2Embed

    assert Gen2Embed
    for number, page in enumerate(wanted):
        child = os.fork()
        if child == 0:
            try:
                _run_page(folder, number, page)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def draw_small(folder: Path) -> None:
    """Draw MMEB-mini with 12 rows and 16 training pairs per dataset, where the default one would be.

    The pages draw as few rows, if they draw it elsewhere.
    """
    from gen2embed_mteb.mini import benchmark
    from gen2embed_mteb.mini.tasks import tasks

    small = [replace(task, num_train=min(task.num_train, 16)) for task in tasks(benchmark.train_digits)]
    benchmark.NUM_QUERIES = 12
    benchmark.ensure("eval")
    benchmark.tasks = lambda _: small
    benchmark.ensure("train")
    benchmark.ensure("crepe")
    os.environ["MMEB_MINI_DIR"] = str(benchmark.default_root())
    assert str(folder) in os.environ["MMEB_MINI_DIR"]


def _run_page(folder: Path, number: int, page: str) -> None:
    signal.alarm(_LONGEST)  # a page that hangs dies, and its test says so
    place = folder / f"page{number}"
    place.mkdir()
    os.chdir(place)
    captured = folder / f"{number}.out"
    errors = os.open(folder / f"{number}.err", os.O_WRONLY | os.O_CREAT)
    printed = os.open(captured, os.O_WRONLY | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(errors, 2)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    results: list[dict[str, Any]] = []
    for block in blocks_of(page):
        if block.language not in RUN or block.reason:
            continue
        start, error, began = captured.stat().st_size, "", time.monotonic()
        try:
            _RUNNERS[block.language](block, namespace)
        except BaseException:  # also SystemExit: a block that ends the process has failed
            error = traceback.format_exc()
        sys.stdout.flush()
        text = captured.read_bytes()[start:].decode("utf-8", "replace")
        results.append({"line": block.line, "printed": text, "error": error, "seconds": time.monotonic() - began})
        if error:
            break
    (folder / f"{number}.json").write_text(json.dumps(results), encoding="utf-8")


def _run_python(block: Block, namespace: dict[str, Any]) -> None:
    notebook = block.page.endswith(".ipynb")  # whose cells have no lines in the file
    name = f"<{block.page}, cell {block.line}>" if notebook else block.page
    code = block.code if notebook else "\n" * (block.line - 1) + block.code
    exec(compile(code, name, "exec"), namespace)


def _run_bash(block: Block, _: dict[str, Any]) -> None:
    for command in commands_of(block.code):
        _run_command(command)


def commands_of(code: str) -> Iterator[str]:
    """The commands of a block, continued lines joined, comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in re.sub(r"(^|\s)#.*$", "", line).split(" && "):
            if command.strip():
                yield command.strip()


def _run_command(command: str) -> None:
    words = shlex.split(command)
    given: dict[str, str] = {}
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        given[name] = value
    if not words:
        os.environ |= given
        return
    if words[0] == "cd":
        os.chdir(words[1])
        return
    before = dict(os.environ)
    os.environ |= given
    try:
        _call(words, command)
    finally:
        for name in given:
            os.environ.pop(name)
        os.environ |= {name: before[name] for name in given if name in before}


def _call(words: list[str], command: str) -> None:
    for start, module in _MAINS.items():
        if tuple(words[: len(start)]) == start:
            status = importlib.import_module(module).main(words[len(start) :])
            assert not status, f"{command} ended with status {status}"
            return
    if words[0] == "mteb":
        from mteb.cli import main as mteb_main

        sys.argv = words
        mteb_main()
        return
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True)


_RUNNERS = {"python": _run_python, "bash": _run_bash}

if __name__ == "__main__":
    run_pages(Path(sys.argv[1]), sys.argv[2:])
