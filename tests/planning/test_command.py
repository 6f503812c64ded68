"""`gen2embed plan`: lengths against the loaded model's own, and the command on the embedded model."""

import json
import re
from pathlib import Path

import pytest

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.inspection.prompt_inspection import open_prompt
from gen2embed_mteb.planning.lengths import LengthCounter

CASES = [
    ("a red circle", ()),
    ("", ((64, 64),)),
    ("what is it? " * 9, ((90, 300),)),
    ("both", ((64, 64), (200, 56))),
]


@pytest.mark.parametrize("side", ["query", "document"])
def test_lengths_are_those_of_the_loaded_model(side: str) -> None:
    model = Gen2Embed("gen2embed-mini", device="cpu")
    counter = LengthCounter(open_prompt("gen2embed-mini"))
    found = [counter.lengths(side, text, sizes) for text, sizes in CASES]
    want = PrefixEncoder(model).count_tokens(side, [text for text, _ in CASES], [sizes for _, sizes in CASES])
    assert all(abs(one.tokens - tokens) <= 2 for one, tokens in zip(found, want, strict=True))
    assert [len(one.patches) for one in found] == [0, 1, 1, 2]
    merged = model[0].model.config.vision_config.spatial_merge_size ** 2
    assert all(patches % merged == 0 for one in found for patches in one.patches)
    assert found[1].tokens > found[1].patches[0] // merged  # the picture's tokens, and what stands around them
    assert LengthCounter(open_prompt("gen2embed-mini"), 30).lengths(side, "word " * 99, ()).tokens < 30


def test_plan_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "numbers", "--model_name", "gen2embed-mini", "--num_queries", "1000", "--num_candidates", "2000"]
    assert cli.main([*words, "--search", "--gpu", "L4", "--num_gpus", "4", "--utilization", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "4 x L4, 121 TFLOP/s" in out
    assert "assumed to reach 25 %" in out
    assert "lengths" not in out
    search = next(line for line in out.splitlines() if line.startswith("search all"))
    assert f"{2 * 1000 * 2000 * 192:.3g}" in search
    assert cli.main([*words[:4], "--search", "--num_queries", "5"]) == 2
    assert "a search needs --num_queries and --num_candidates" in capsys.readouterr().err
    assert cli.main([*words, "--gpu", "abacus"]) == 2
    assert cli.main([*words, "--utilization", "0"]) == 2


@pytest.mark.exhaustive
def test_plan_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model_name", "gen2embed-mini", "--num_sampled", "40"]
    assert cli.main(["plan", "evaluate", "--benchmark", "mmeb-mini", "--subsets", "ColorShape", *model]) == 0
    out = capsys.readouterr().out
    assert "encode queries" in out
    assert "pictures" in out
    assert "lengths   of 40 of" in out
    assert cli.main(["plan", "sample", "--data_dir", "mmeb-mini", "--subsets", "Digits", *model]) == 0
    out = capsys.readouterr().out
    assert re.search(r"search Digits +1,297 x 10 ", out)
    assert re.search(r"encode candidates +10 ", out)


def test_plan_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"text": f"a text of row {number}"}) for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    words = ["plan", "encode", "--model_name", "gen2embed-mini", "--input", str(tmp_path / "rows.jsonl")]
    assert cli.main([*words, "--num_sampled", "20"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"encode candidates +200 ", out)  # the broken row would be set aside
    assert "lengths   of 20 of 200 candidates" in out
    assert cli.main([*words, "--side", "query"]) == 0
    assert re.search(r"encode queries +200 ", capsys.readouterr().out)
