"""`gen2embed table` from beginning to end on a small MMEB-mini: runs, records, files, and what a second call does."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen2embed_mteb import cli
from gen2embed_mteb.mini import benchmark, crepe
from gen2embed_mteb.mini.tasks import tasks
from gen2embed_mteb.mmeb.datasets import Benchmark
from gen2embed_mteb.paper_tables.published import published
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.table_command.options import TableOptions
from gen2embed_mteb.table_command.plans import Passed, Plan, Run

pytestmark = pytest.mark.slow

DATASETS = ("ColorShape", "AttributeQA", "Scenes_t2i", "Pointing-Place")
"""One of each meta-task, the last out of domain."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MMEB-mini of four datasets with three rows and 16 training pairs each; the tests see no other."""
    root = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        known = [task for task in tasks(benchmark.train_digits) if task.info.name in DATASETS]
        few = [replace(task, num_train=min(task.num_train, 16)) for task in known]
        patch.setattr(benchmark, "NUM_QUERIES", 3)
        patch.setattr(crepe, "NUM_RECORDS", 2)
        patch.setattr(benchmark, "tasks", lambda _: few)
        patch.setattr(benchmark, "MMEB_MINI", Benchmark("mmeb-mini", "MMEB-mini", tuple(task.info for task in few)))
        benchmark.ensure("eval", root)
        yield root


def table(drawn: Path, output: Path, name: str, *more: str) -> tuple[int, str]:
    """What a call returns and prints."""
    printed = io.StringIO()
    words = ["table", name, "--mini", "--data_dir", str(drawn), "--output_dir", str(output), "--device", "cpu"]
    with contextlib.redirect_stdout(printed):
        status = cli.main([*words, "--limit", "2", *more])
    return status, printed.getvalue()


def rows_of(output: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in json.loads((output / f"table_{name}.json").read_text())["rows"] if row["by"] != "published"]


@pytest.fixture(scope="module")
def second(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of Table II, and what was printed."""
    output = tmp_path_factory.mktemp("tables")
    status, printed = table(drawn, output, "II")
    assert status == 0
    return output, printed


def test_figures_are_those_of_the_command(drawn: Path, second: tuple[Path, str], tmp_path: Path) -> None:
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--data_dir", str(drawn)]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main([*words, "--limit", "2", "--output_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    plain, hierarchical = rows_of(second[0], "II")
    assert (plain["labels"][0], hierarchical["labels"][0]) == ("prompt none", "prompt hierarchical")
    wanted = {task: 100 * one["precision_at_1"] for task, one in results["meta_tasks"].items()}
    assert hierarchical["figures"] == wanted | {"overall": 100 * results["overall"]}
    assert plain["figures"] != hierarchical["figures"]
    cells = [f"{figure:.1f}" for figure in hierarchical["figures"].values()]
    line = next(line for line in second[1].splitlines() if "prompt hierarchical" in line)
    assert line.split()[-5:] == cells
    for ending in ("md", "tex"):
        assert all(cell in (second[0] / f"table_II.{ending}").read_text() for cell in cells)


def test_it_says_what_is_run_and_on_what(drawn: Path, second: tuple[Path, str]) -> None:
    output, printed = second
    assert printed.startswith("Table II needs 2 runs (2 evaluate); 0 finished, 2 to run:\n  gen2embed evaluate ")
    assert "Run here: mmeb-mini, 4 datasets, the first 2 rows of each." in printed
    assert "small ones that were drawn, not the paper's" in printed
    assert "gen2embed-mini: layout native" in printed
    (log,) = (output / "logs" / "gen2embed-mini").glob("mmeb-mini-none-*.log")
    assert "paper, II: Qwen2-VL-2B, no prompt" in log.read_text()


def test_finished_runs_are_found_by_their_records(
    drawn: Path, second: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = second[0]
    monkeypatch.setattr("gen2embed_mteb.embedder.model.Gen2Embed", None)  # no model can be loaded
    before = {path: path.read_bytes() for path in output.glob("table_II.*")}
    status, printed = table(drawn, output, "II")
    assert (status, printed.splitlines()[0]) == (0, "Table II: all 2 runs (2 evaluate) are finished; nothing is run.")
    assert {path: path.read_bytes() for path in output.glob("table_II.*")} == before
    status, printed = table(drawn, output, "IV", "--dry_run")
    assert printed.startswith("Table IV needs 7 runs (7 evaluate); 2 finished, 5 to run:")


def test_results_of_other_data_or_changed_results_are_refused(
    drawn: Path, second: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = second[0]
    benchmark.ensure("eval", tmp_path / "other")
    assert table(tmp_path / "other", output, "II")[0] == 2
    assert "is of another run (data_dir is" in capsys.readouterr().err
    assert "0 finished, 2 to run" in table(tmp_path / "other", output, "II", "--overwrite", "--dry_run")[1]
    (results,) = output.glob("runs/gen2embed-mini/mmeb-mini-none-*/results.json")
    content = results.read_bytes()
    results.write_bytes(content.replace(b"overall", b"Overall"))
    assert table(drawn, output, "II")[0] == 2
    assert "results.json" in capsys.readouterr().err
    results.write_bytes(content)
    assert table(drawn, output, "II")[0] == 0
    foreign = tmp_path / "tables"
    foreign.mkdir()
    (foreign / "table_II.md").write_text("mine")
    assert table(drawn, foreign, "II")[0] == 2
    assert (foreign / "table_II.md").read_text() == "mine"


def test_mistakes_are_found_before_the_first_run(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gen2embed_mteb.table_command.command.execute", None)
    for more, said in (
        (["--model_name", "gen2embed-mini", str(tmp_path / "nowhere")], "nowhere"),
        (["--num_crops", "4"], "num_crops is a setting of Phi-3.5-V"),
        (["--prompts", "unime", "--layout", "native", "--resize", "round"], "resize is 'round'"),
        (["--prompts", "hierarchical", "--layout", "raw"], "layout='raw' has no turns"),
    ):
        assert table(drawn, tmp_path / "out", "II", *more)[0] == 2
        assert said in capsys.readouterr().err
    words = ["table", "II", "--data_dir", str(drawn), "--model_name", "gen2embed-mini", "--output_dir", str(tmp_path)]
    assert cli.main(words) == 2
    assert "ImageNet-1K" in capsys.readouterr().err  # a dataset of MMEB that is not there


def test_table_iii_is_labelled_and_has_two_averages(
    drawn: Path, second: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = published("III")
    few = replace(whole, rows=(whole.rows[1], *whole.rows[7:8]))  # the others take a second each
    for module in ("plans", "command"):
        monkeypatch.setattr(f"gen2embed_mteb.table_command.{module}.published", lambda _: few)
    status, printed = table(drawn, second[0], "III")
    assert status == 0
    assert "Another experiment than the paper's" in printed
    rows = {tuple(row["labels"]): row["figures"] for row in rows_of(second[0], "III")}
    assert len(rows) == 2
    shared = rows_of(second[0], "II")[1]["figures"]
    both = rows["✓", "✓", "✗", "✗"]
    assert both["overall"] == shared["overall"]
    assert both["mean_of_meta_tasks"] == pytest.approx(sum(list(shared.values())[:4]) / 4)


@pytest.fixture(scope="module")
def trained(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of Table V, whose model was sampled for, trained and evaluated, and what was printed."""
    output = tmp_path_factory.mktemp("trained")
    status, printed = table(drawn, output, "V", *STEPS)
    assert status == 0
    return output, printed


STEPS = ("--max_steps", "1", "--train_batch_size", "16", "--train_limit", "16")


def test_a_table_of_trained_models(drawn: Path, trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    output, printed = trained
    assert printed.startswith("Table V needs 3 runs (1 sample, 1 train, 1 evaluate); 0 finished, 3 to run:")
    (row,) = rows_of(output, "V")
    fingerprint = json.loads((output / "table_V.json").read_text())["runs"][-1]["fingerprint"]
    assert row["labels"] == ["SaHa, k = 15", "gen2embed-mini", "–"]
    assert row["figures"]["overall"] is not None
    assert row["figures"]["ood"] == row["figures"]["Grounding"]
    (record,) = output.glob("runs/gen2embed-mini/mini-train-*/train.json")
    arguments = json.loads(record.read_text())["arguments"]
    assert (arguments["max_steps"], arguments["per_device_train_batch_size"]) == (1, 16)
    (results,) = output.glob("runs/gen2embed-mini/mini-train-*-mmeb-mini-*/results.json")
    found = json.loads(results.read_text())
    assert (Path(found["model"]), found["fingerprint"]) == (record.parent, fingerprint)
    monkeypatch.setattr("gen2embed_mteb.embedder.model.Gen2Embed", None)
    monkeypatch.setattr("trainers.fine_tuning.train", None)
    assert "all 3 runs (1 sample, 1 train, 1 evaluate) are finished" in table(drawn, output, "V", *STEPS)[1]
    assert "3 finished, 18 to run" in table(drawn, output, "VII", *STEPS, "--dry_run")[1]


def test_a_model_that_was_trained_elsewhere_counts_if_its_steps_had_as_many_pairs(
    drawn: Path, trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = trained[0].glob("runs/gen2embed-mini/mini-train-*/train.json")
    folder, content = OwnedFolder(record.parent, "train"), json.loads(record.read_text())
    elsewhere = {"world_size": 4, "per_device_train_batch_size": 4, "bf16": True}
    folder.write_json("train.json", content | {"arguments": content["arguments"] | elsewhere})
    assert "nothing is run" in table(drawn, trained[0], "V", *STEPS)[1]
    folder.write_json("train.json", content | {"arguments": content["arguments"] | {"world_size": 4}})
    assert table(drawn, trained[0], "V", *STEPS)[0] == 2
    assert "was trained with per_device" in capsys.readouterr().err.replace("world_size", "per_device")
    folder.write_json("train.json", content)


def flags(run: Run) -> dict[str, str]:
    """The flags of a run with their values."""
    return dict(zip(run.words[1::2], run.words[2::2], strict=True))


def test_tiles_are_passed_to_the_models_that_have_them(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    settings = {"model_type": "phi3_v", "rope_scaling": {"type": "su", **factors}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    phi = str(tmp_path)
    options = TableOptions(table="II", mini=True, model_name=("gen2embed-mini", phi), prompts=("none",))
    passed = Passed(loading=("--device", "cpu", "--num_crops", "4", "--max_length", "256"))
    words = {one["--model_name"]: one for one in map(flags, Plan(options, passed).runs)}
    assert "--num_crops" not in words["gen2embed-mini"]
    assert (words["gen2embed-mini"]["--max_length"], words[phi]["--num_crops"]) == ("256", "4")


@pytest.mark.exhaustive
def test_unimes_protocol_and_the_caption_benchmarks(
    drawn: Path, second: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = table(drawn, second[0], "unime-mmeb")
    assert status == 0
    assert "2 runs (2 evaluate); 1 finished, 1 to run" in printed
    raw, hierarchical = rows_of(second[0], "unime-mmeb")
    assert (raw["labels"], hierarchical["labels"]) == (["prompt raw"], ["prompt hierarchical"])
    assert raw["figures"] != rows_of(second[0], "II")[0]["figures"]
    assert "layout native, raw" in printed
    status, printed = table(drawn, second[0], "VI", "--limit", "1")
    assert status == 0
    (row,) = rows_of(second[0], "VI")
    (plus,) = second[0].glob("runs/gen2embed-mini/sugarcrepe++-mini-hierarchical-*/results.json")
    sets = json.loads(plus.read_text())["datasets"]
    assert row["figures"]["swap_object.tot"] == 100 * sets["swap_object"]["accuracy_tot"]
    assert row["figures"]["replace_relation.itt"] == 100 * sets["replace_relation"]["accuracy_itt"]
    assert "sugarcrepe-mini, 7 sets, the first 1 row of each" in printed
    status, printed = table(drawn, second[0], "unime-diverse", "--limit", "4", "--prompts", "unime")
    assert status == 0
    (row,) = rows_of(second[0], "unime-diverse")
    (found,) = second[0].glob("runs/gen2embed-mini/diverse-mini-unime-*/results.json")
    recalls = json.loads(found.read_text())["datasets"]["flickr30k-mini"]["text_to_image"]
    assert row["figures"]["flickr30k.t2i"] == 100 * recalls["recall_at_1"]
    assert row["figures"].get("coco.t2i") is None
    assert set(row["figures"]) >= {"urban1k.i2t", "sugarcrepe.replace", "sugarcrepe.swap", "sugarcrepe.add"}
    assert "exchanged" in printed
