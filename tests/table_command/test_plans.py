"""Which runs a table needs, what they share, and which settings are refused before anything is read."""

from pathlib import Path
from typing import Any

import pytest

from gen2embed_mteb import cli
from gen2embed_mteb.config import EncodingConfig, EvaluationConfig, LoadingOptions
from gen2embed_mteb.embedder.prompts.strategies import TABLE_IV
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import FlagParser, add_flags, as_words, from_flags
from gen2embed_mteb.names import MINI_FOLDER
from gen2embed_mteb.table_command.command import passed_on
from gen2embed_mteb.table_command.options import TableOptions
from gen2embed_mteb.table_command.plans import Passed, Plan, Run, slug, standing_for

FULL: dict[str, Any] = {"data_dir": "eval", "train_data_dir": "train"}


def plan(table: str, **options: Any) -> Plan:
    return Plan(TableOptions(table=table, **options), Passed())


def flags(run: Run) -> dict[str, str]:
    """The flags of a run with their values."""
    return dict(zip(run.words[1::2], run.words[2::2], strict=True))


def test_tables_share_the_evaluations_of_the_same_prompt() -> None:
    folders = {name: {run.folder for run in plan(name, mini=True).runs} for name in ("II", "III", "IV", "unime-mmeb")}
    assert {name: len(found) for name, found in folders.items()} == {"II": 2, "III": 10, "IV": 7, "unime-mmeb": 2}
    assert folders["II"] < folders["IV"]
    # none, system, hierarchical, d-rein and qd-rein are rows of both.
    assert len(folders["III"] & folders["IV"]) == 5
    assert len(folders["unime-mmeb"] & folders["II"]) == 1
    assert [flags(run)["--prompt_mode"] for run in plan("IV", mini=True).runs] == list(TABLE_IV)


def test_tables_share_trained_models() -> None:
    folders = {name: {run.folder for run in plan(name, mini=True).runs} for name in ("V", "VII", "VIII")}
    assert {name: len(found) for name, found in folders.items()} == {"V": 3, "VII": 21, "VIII": 12}
    assert folders["V"] < folders["VII"]
    assert len(folders["VII"] & folders["VIII"]) == 6  # HN, k = 7, and SaHa, k = 7, with a pool of 4


def test_the_papers_batches_and_the_pairs_of_every_row() -> None:
    """Table VII: 1,024 pairs, 256 queries, 256 clusters of 8, 128 of 16; as many pairs whatever the negatives are."""
    rows = plan("VII", data_dir="eval", train_data_dir="train", model_name=("m",)).rows
    assert [row.labels[3] for row in rows] == ["1024", "1024", "256", "256", "256", "256", "128"]
    sizes = [int(flags(row.training)["--batch_size"]) for row in rows if row.training]
    assert sizes == [1024, 1024, 256, 256, 256, 2048, 2048]
    assert {flags(row.training)["--num_epochs"] for row in rows if row.training} == {"1.5"}
    rows = plan("VII", mini=True, max_steps=6, train_batch_size=32).rows
    trained = [flags(row.training) for row in rows if row.training]
    assert [one["--max_steps"] for one in trained] == ["12", "12", "48", "48", "48", "6", "6"]
    assert {int(one["--max_steps"]) * int(one["--batch_size"]) for one in trained} == {192}
    methods = [
        (flags(row.sampling)["--method"], flags(row.sampling).get("--pool_multiplier")) for row in rows if row.sampling
    ]
    assert methods == [
        *[("in-batch", None)] * 2,
        *[("hn", None)] * 2,
        ("hn-beta", None),
        ("saha", "4"),
        ("saha", "6"),
    ]
    assert [flags(row.sampling)["--prompt_mode"] for row in rows if row.sampling][:2] == ["none", "hierarchical"]


def test_folders_differ_where_figures_do() -> None:
    base = plan("II", mini=True).runs[0].folder
    assert base == Path("results/tables-mini/runs/gen2embed-mini/mmeb-mini-none")
    assert plan("II", mini=True, limit=3).runs[0].folder != base
    assert plan("II", mini=True, layout="official").runs[0].folder != base

    def passing(*words: str) -> Path:
        return Plan(TableOptions(table="II", mini=True), Passed(encoding=words)).runs[0].folder

    assert passing("--resize", "square-448") != base
    assert passing("--device", "cpu", "--batch_tokens", "512", "--overwrite", "--num_workers", "2") == base
    assert plan("V", mini=True, learning_rate=1e-4).rows[0].training != plan("V", mini=True).rows[0].training
    assert not any(":" in run.folder.name for run in plan("III", mini=True).runs)


def test_what_may_be_read_from_elsewhere_is_passed_to_every_run() -> None:
    options = TableOptions(
        table="V",
        mini=True,
        checkpoint=("tuned",),
        model_name=("m",),
        remote_images=("memory://b/",),
        follow_links=True,
    )
    loading, encoding = LoadingOptions(), EncodingConfig()
    made = Plan(options, passed_on(options, loading, encoding))
    assert {run.command for run in made.runs} == {"sample", "train", "evaluate"}
    for run in made.runs:
        assert run.words[run.words.index("--remote_images") + 1] == "memory://b/", run.words
        assert "--follow_links" in run.words, run.words
    with pytest.raises(Gen2EmbedError, match="file"):
        TableOptions(table="II", mini=True, remote_images=("file",))


def test_words_give_a_configuration_its_values_again() -> None:
    config = EvaluationConfig(
        data_dir="a b",
        output_dir="out",
        subsets=("Digits", "Pointing"),
        split="dev",
        max_error_rate=0.5,
        overwrite=True,
        limit=3,
        fingerprint="x",
    )
    parser = FlagParser()
    add_flags(parser, EvaluationConfig)
    assert from_flags(EvaluationConfig, parser.parse_args(as_words(config)), fingerprint="x") == config
    assert as_words(EncodingConfig()) == []


def test_raw_is_mmebs_text_alone() -> None:
    raw, prompted = plan("unime-mmeb", data_dir="eval", model_name=("a/b",)).runs
    assert (flags(raw)["--layout"], flags(raw)["--prompt_mode"]) == ("raw", "none")
    assert "--layout" not in flags(prompted)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEN2EMBED_MODEL", raising=False)
    assert standing_for("gen2embed") == "Qwen/Qwen2-VL-2B-Instruct"
    monkeypatch.setenv("GEN2EMBED_MODEL", "gen2embed-mini")
    assert standing_for("gen2embed") == "gen2embed-mini"
    assert standing_for("a/b") == "a/b"
    assert slug("Qwen/Qwen2-VL-2B-Instruct") == "Qwen--Qwen2-VL-2B-Instruct"
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert slug(str(tmp_path / "one" / "model")) != slug(str(tmp_path / "two" / "model"))
    assert slug(str(MINI_FOLDER)).startswith("model-")


def test_checkpoints_stand_beside_or_instead_of_models() -> None:
    both = plan("V", **FULL, model_name=("m",), checkpoint=("c",))
    assert [row.model for row in both.rows] == ["m", "c"]
    alone = plan("VI", data_dir="eval", plus_data_dir="plus", image_dir="coco", checkpoint=("c",))
    assert [row.model for row in alone.rows] == ["c"]
    places = [(flags(run)["--benchmark"], flags(run)["--data_dir"], flags(run)["--image_dir"]) for run in alone.runs]
    assert places == [("sugarcrepe", "eval", "coco"), ("sugarcrepe++", "plus", "coco")]
    # An evaluation of checkpoints alone needs no training data.
    assert [run.command for run in plan("V", data_dir="eval", checkpoint=("c",)).runs] == ["evaluate"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": "IX"}, "there is no table 'IX'"),
        ({"table": "II"}, "table II needs --data_dir"),
        ({"table": "VI", "data_dir": "d"}, "table VI needs --plus_data_dir"),
        ({"table": "VII", "data_dir": "d"}, "table VII needs --train_data_dir"),
        ({"table": "II", "mini": True, "image_dir": "d"}, "image_dir with --mini"),
        ({"table": "II", "mini": True, "checkpoint": ("c",)}, "checkpoint is for table V, VI"),
        ({"table": "IV", "mini": True, "prompts": ("none",)}, "prompts is for table II, VI"),
        ({"table": "II", "mini": True, "prompts": ("hierarchic",)}, "Did you mean 'hierarchical'"),
        ({"table": "II", "mini": True, "prompts": ("none", "none")}, "name each once"),
        ({"table": "II", "mini": True, "max_steps": 1}, "max_steps is for table V, VII, VIII"),
        ({"table": "V", "mini": True, "max_steps": 1, "num_epochs": 1.0}, "pass one of them"),
        ({"table": "V", "mini": True, "train_batch_size": 24}, "pass a multiple of 16"),
        ({"table": "II", "mini": True, "limit": 0}, "limit is 0"),
        ({"table": "VII", "mini": True, "train_limit": 15}, "train_limit is 15; pass 16 or more"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Gen2EmbedError) as refused:
        TableOptions(**options)
    assert said in str(refused.value)


def test_a_dry_run_lists_commands_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["table", "VII", "--mini", "--data_dir", "drawn", "--dry_run", "--device", "cpu", "--min_side", "32"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Table VII needs 21 runs (7 sample, 7 train, 7 evaluate); 0 finished, 21 to run:"
    assert len(printed) == 22
    assert sum("--device cpu" in line for line in printed) == 14
    assert sum("--min_side 32" in line for line in printed) == 21
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(words) == 2
    assert "table runs in one process" in capsys.readouterr().err
