"""`gen2embed export --check`, and what an exported folder says on serving."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.serving.plain_client import PlainClientError, check_plain

pytestmark = pytest.mark.slow

NEEDS = "llava_next" if importlib.util.find_spec("torchvision") is None else "qwen2_vl"
"""A family that plain sentence-transformers loads here."""


@pytest.mark.exhaustive
def test_plain_sentence_transformers_gives_the_same_vectors(tiny_dir: Any, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["export", str(tiny_dir(NEEDS)), str(tmp_path / "out"), "--check", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "two images         1.000000  1.000000\n" in printed
    assert "All vectors of plain sentence-transformers are those of the local model." in printed


@pytest.mark.exhaustive
def test_a_folder_with_other_weights_fails(exported: Any, tiny: Any, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(exported(NEEDS), tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(".norm.weight"))
    weights[name] = weights[name] * torch.linspace(0.1, 2, len(weights[name]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert check_plain(folder, tiny(NEEDS)).faults


@pytest.mark.exhaustive
def test_a_folder_that_does_not_load_there_is_told(exported: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlainClientError, match=r"cannot use .*Error"):
        check_plain(tmp_path, Gen2Embed(exported("llava_next"), device="cpu"))


def test_a_reranker_has_no_vectors_to_check(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["export", "gen2embed-mini", str(tmp_path / "out"), "--as", "reranker", "--check"]) == 2
    assert "--check compares vectors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_says_how_to_ask_a_server(exported: Any, family: str) -> None:
    card = (exported(family) / "README.md").read_text(encoding="utf-8")
    assert card.count("## Serving") == 1
    assert f'"add_special_tokens": {family == "llava_next"},' in card
    assert card.index("## Serving") < card.index("### Framework Versions")


def test_the_readme_is_silent_where_servers_give_other_vectors(tiny_dir: Any, tmp_path: Path) -> None:
    Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", readout="drop-1").save_pretrained(str(tmp_path / "out"))
    assert "## Serving" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
