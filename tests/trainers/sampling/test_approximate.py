"""`sample --search ivf:…`: the record and the table say so, and exact and approximate runs are not mixed."""

import json
from pathlib import Path

import pytest

from gen2embed_mteb import cli

pytest.importorskip("faiss")


@pytest.mark.exhaustive
def test_an_approximate_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"query": f"question {n} of {n % 13}", "positive": f"answer {n}"}) + "\n" for n in range(120)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["sample", "--model_name", "gen2embed-mini", "--data_dir", str(tmp_path / "pairs.jsonl")]
    words += ["--output_dir", str(tmp_path / "out"), "--num_hard_negatives", "3", "--device", "cpu"]
    asked = [*words, "--search", "ivf:3,1", "--search_threshold", "50"]
    assert cli.main(asked) == 2
    assert "pass --search_backend faiss, too" in capsys.readouterr().err
    asked += ["--search_backend", "faiss"]
    assert cli.main(asked) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert record["settings"]["search"] == "ivf:3,1"
    search = record["search"]
    assert (search["kind"], search["nlist"], search["nprobe"], search["recall_at"]) == ("ivf", 3, 1, 18)
    assert search["recall_queries"] == 120
    assert 0 < search["recall"] <= 1
    assert "recall of the search" in out
    assert f"{search['recall']:.4f}" in out
    assert cli.main(words) == 2
    assert "search was 'ivf:3,1', now 'exact'" in capsys.readouterr().err
    # So few candidates that they are searched exactly, which the record says.
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "small")
    assert cli.main([*words, "--search", "ivf:3,1", "--search_backend", "faiss"]) == 0
    assert json.loads((tmp_path / "small" / "pairs.json").read_text())["search"] == {"kind": "exact"}
    assert "recall" not in capsys.readouterr().out
