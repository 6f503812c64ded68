"""The blocks of the guide that load vectors into stores, run where the store is installed: all find the same rows."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import blocks_of
from PIL import Image

from gen2embed_mteb import cli

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

PAGE = "docs/guides/encode_folders.md"


def block(word: str) -> str:
    """The block of the guide that imports a module."""
    found = [one.code for one in blocks_of(PAGE) if re.search(rf"^(?:import|from) {word}\b", one.code, re.M)]
    assert len(found) == 1, word
    return found[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the guide's first blocks were run."""
    folder = tmp_path_factory.mktemp("stores")
    for color in ("red", "green", "blue", "yellow", "white", "black"):
        (folder / "photos" / "plain").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), color).save(folder / "photos" / "plain" / f"{color}.png")
    words = ["encode", "--model_name", "gen2embed-mini", "--rows_per_shard", "4", "--input", str(folder / "photos")]
    assert cli.main([*words, "--output_dir", str(folder / "photos-index")]) == 0
    return folder


@pytest.mark.parametrize("store", ["lancedb", "qdrant_client", "duckdb"])
def test_every_store_finds_what_faiss_finds(
    place: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip(store)
    monkeypatch.chdir(place)
    namespace: dict[str, Any] = {"size": 192}
    printed = []
    for word in ("faiss", store):
        exec(compile(block(word), PAGE, "exec"), namespace)
        printed.append(ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1]))
    assert len(printed[0]) == 3
    assert printed[0] == printed[1]
    assert cli.main(["search", "--index", "photos-index", "--query", "a yellow circle", "--top", "3"]) == 0
    shown = re.findall(r"plain/\w+\.png", capsys.readouterr().out)
    assert shown == printed[0]
