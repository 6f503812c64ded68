"""`~` is the home folder in every path flag of every command, also behind `=`, where shells leave it alone."""

import json
from pathlib import Path

import pytest

from gen2embed_mteb import cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.storage.paths import expand_home
from trainers.fine_tuning import parse
from vlm2vec_adapter.__main__ import main as vlm2vec

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and another current one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    monkeypatch.setattr(benchmark, "NUM_QUERIES", 4)  # rows that MMEB-mini draws per dataset
    return home


def test_words(home: Path) -> None:
    words = ["sample", "~/a", "--output_dir=~/x", "--data-dir=~", "--beta=-0.02", "./a//b", "a~b"]
    assert expand_home([*words, "--x=a=~/b", "~~", "~no/x"]) == [
        "sample", f"{home}/a", f"--output_dir={home}/x", f"--data-dir={home}", "--beta=-0.02", "./a//b", "a~b",
        "--x=a=~/b", "~~", "~no/x",
    ]  # fmt: skip


def test_every_command(home: Path) -> None:
    rows = [{"anchor": f"query {number}", "positive": f"answer {number}"} for number in range(6)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled = ["sample", "--data_dir=~/pairs.jsonl", "--output_dir=~/out", "--embedding_dir=~/vectors"]
    assert cli.main([*sampled, "--model_name", "gen2embed-mini", "--num_hard_negatives=1"]) == 0
    assert (home / "out" / "pairs.parquet").is_file()
    assert (home / "vectors").is_dir()
    assert cli.main(["inspect", "~/out/pairs.parquet", "--output=~/page.html", "--data_dir=~/pairs.jsonl"]) == 0
    assert (home / "page.html").is_file()
    assert cli.main(["export", "gen2embed-mini", "~/exported"]) == 0
    evaluated = ["evaluate", "--model_name=~/exported", "--benchmark=mmeb-mini", "--data_dir=~/mini"]
    assert cli.main([*evaluated, "--output_dir=~/scores", "--subsets", "Digits", "--limit", "3"]) == 0
    assert (home / "scores" / "results.json").is_file()
    assert (home / "mini").is_dir()
    flags = ["--output_dir=~/trained", "--processed_data_path=~/out", "--data_dir=~/pairs.jsonl"]
    config, args = parse(
        [*flags, "--model_name=~/exported", "--use_cpu", "true", "--eval_benchmark=mmeb", "--eval_data_dir=~/mini"]
    )
    assert args.output_dir == f"{home}/trained"
    assert (config.processed_data_path, config.data_dir) == (f"{home}/out", f"{home}/pairs.jsonl")
    assert (config.model_name, config.eval_data_dir) == (f"{home}/exported", f"{home}/mini")
    assert vlm2vec(["mini", "~/drawn"]) == 0
    assert (home / "drawn" / "MMEB-eval").is_dir()
    assert list(Path().iterdir()) == []  # no folder called `~`


@pytest.mark.exhaustive
def test_demo(home: Path) -> None:
    assert cli.main(["demo", "--output_dir=~/demo", "--data_dir=~/mini", "--limit", "2", "--max_steps", "0"]) == 0
    assert (home / "demo" / "report.html").is_file()
    assert list(Path().iterdir()) == []
