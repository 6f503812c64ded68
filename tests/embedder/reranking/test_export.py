"""`gen2embed export --as reranker`: a folder that plain `CrossEncoder` loads."""

from __future__ import annotations

import json

import pytest
from sentence_transformers import CrossEncoder

from gen2embed_mteb import cli
from gen2embed_mteb.embedder.reranking.config import STOCK_FRAMINGS, ExportKind
from gen2embed_mteb.embedder.reranking.export import export_reranker
from gen2embed_mteb.embedder.reranking.framings import FRAMINGS
from gen2embed_mteb.errors import Gen2EmbedError

pytestmark = pytest.mark.slow

CLIENT = """
import sys
from sentence_transformers import CrossEncoder
scores = CrossEncoder(sys.argv[1], device="cpu").predict([("a cat", "a dog"), ("b", "c")])
assert "gen2embed_mteb" not in sys.modules
print(*map(float, scores))
"""


def test_the_command_writes_stock_modules(tiny, tiny_dir, tmp_path, capsys, preloaded_stock):
    out = tmp_path / "out"
    assert cli.main(["export", str(tiny_dir("llama")), str(out), "--as", "reranker", "--framing", "yes-no"]) == 0
    assert f'Load it with CrossEncoder("{out}")' in capsys.readouterr().out
    types = [module["type"] for module in json.loads((out / "modules.json").read_text())]
    assert [one.rpartition(".")[2] for one in types] == ["Transformer", "LogitScore"]
    assert all(one.startswith("sentence_transformers.") for one in types)
    found = preloaded_stock.run(["-c", CLIENT, str(out)], check=True)
    expected = tiny("llama").reranker("yes-no").predict([("a cat", "a dog"), ("b", "c")])
    assert list(map(float, found.stdout.split())) == pytest.approx(list(expected), abs=1e-5)


def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    with pytest.raises(Gen2EmbedError, match="framing='likelihood' cannot be saved"):
        export_reranker("no/such-model", tmp_path / "out", framing="likelihood")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        export_reranker("no/such-model", tmp_path / "full")
    assert cli.main(["export", "gen2embed-mini", str(tmp_path / "out"), "--framing", "mcq"]) == 2
    assert "--framing mcq is for rerankers; add --as reranker, or leave it out" in capsys.readouterr().err


def test_the_miniature_is_written_and_ranks_pictures(tmp_path):
    from PIL import Image

    out = export_reranker("gen2embed-mini", tmp_path / "out", device="cpu")
    found = CrossEncoder(str(out), device="cpu").rank("red", [Image.new("RGB", (64, 64), "red"), "a red thing"])
    assert {row["corpus_id"] for row in found} == {0, 1}


def test_the_flag_lists_the_framings_that_are_stock():
    assert tuple(name for name, framing in FRAMINGS.items() if framing.is_stock) == STOCK_FRAMINGS
    with pytest.raises(Gen2EmbedError, match="--as is 'classifier'; known: embedder, reranker"):
        ExportKind(kind="classifier")
