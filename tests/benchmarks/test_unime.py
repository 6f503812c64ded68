"""The tables of `benchmarks/unime.py`, by hand, from runs that are written here; the runs themselves take hours."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest

COLUMNS = ("ind", "ood", "overall")


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "unime.py"
    spec = importlib.util.spec_from_file_location("unime_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["unime_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path):
    settings = {"model_name": "m", "max_steps": 4, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 1}
    settings |= {"eval_limit": 9, "teacher": "t", "distill_steps": 3, "distill_batch_size": 8}
    settings |= {"distill_learning_rate": 1e-3, "work_dir": tmp_path / "runs", "output": tmp_path / "out.json"}
    return argparse.Namespace(**settings)


def write_stage_1(folder, overall):
    (evaluated := folder.with_name(f"{folder.name}-evaluated")).mkdir(parents=True)
    folder.mkdir()
    (evaluated / "results.json").write_text(json.dumps(dict(zip(COLUMNS, (0.5, 0.25, overall), strict=True))))
    (folder / "timing.json").write_text(json.dumps({"train_runtime": 20.0}))


def write_stage_2(folder, overall):
    folder.mkdir(parents=True)
    metrics = {f"eval_mmeb-mini_{name}": value for name, value in zip(COLUMNS, (0.6, 0.5, overall), strict=True)}
    metrics |= {"train_runtime": 100.0, "train_loss": 1.0}
    (folder / "train.json").write_text(json.dumps({"metrics": metrics}))


def test_published_rows_stand_beside_ours(script, arguments):
    for seed, overall in enumerate((0.4, 0.5, 0.6)):
        write_stage_1(arguments.work_dir / "stage-1" / f"seed-{seed}", overall)
        write_stage_2(arguments.work_dir / "both-stages" / f"seed-{seed}", overall + 0.1)
    write_stage_1(arguments.work_dir / "tau-0-02" / "seed-0", 0.3)
    markdown = script.write_results(arguments, dict.fromkeys(COLUMNS, 0.25))
    lines = markdown.splitlines()
    assert "| neither stage | 25.0 | 25.0 | 25.0 | – | – | – | – | 25.3 | Phi-3.5-V | UniME, Table 3 |" in lines
    ours = "| stage 1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 50.0 ± 10.0 | 20 ± 0 | 3 |"
    assert f"{ours} 36.0 | 38.3 | 40.3 | Phi-3.5-V | UniME, Tables 1 and 3 |" in lines
    both = "| both stages | 60.0 ± 0.0 | 50.0 ± 0.0 | 60.0 ± 10.0 | 100 ± 0 | 3 |"
    assert f"{both} 68.2 | 52.7 | 64.2 | Phi-3.5-V | UniME, Tables 1 and 3 |" in lines
    assert "| tau 0.02 | 50.0 | 25.0 | 30.0 | 20 | 1 |" in lines
    assert "256 pairs seen in stage 2" in markdown and "24 texts in stage 1" in markdown
    record = json.loads(arguments.output.read_text())
    assert record["published"]["stage 2"] == {
        **{"source": "UniME, Table 3", "backbone": "Phi-3.5-V", "ind": None, "ood": None, "overall": 63.8}
    }
    assert record["stage_1"]["tau 0.02"]["flags"] == ["--tau", "0.02"]
    assert record["settings"]["distill_steps"] == 3
    assert set(record) >= {"command", "versions", "zero_shot", "table", "variations"}
    assert arguments.output.with_suffix(".md").read_text() == markdown


def test_every_row_has_a_folder_of_its_own_and_a_published_row(script):
    rows = [*script.TABLE, *script.VARIATIONS, script.STAGE_1, *script.STAGE_1_VARIATIONS]
    assert len({row.slug for row in rows}) == len(rows)
    assert set(script.PUBLISHED) == {"neither stage", "stage 1", *(row.name for row in script.TABLE)}
    assert {"both stages", "stage 1, then in-batch"} == script.FROM_STAGE_1


def test_the_texts_of_stage_1_have_no_instruction_and_no_image(script, tmp_path, monkeypatch):
    from gen2embed_mteb.bulk.types import Item
    from gen2embed_mteb.mmeb.readers import TrainRow

    rows = [
        TrainRow(
            0, Item("Find me a picture that matches the given caption: A red ring.\n"), Item("", ("a.png",)), None
        ),
        TrainRow(1, Item("<|image_1|> Which?", ("b.png",)), Item("white star"), None),
        TrainRow(2, Item("<|image_1|> Which?", ("c.png",)), Item("white star"), None),
    ]
    subset = argparse.Namespace(rows=lambda: rows)
    monkeypatch.setattr(script, "open_training_data", lambda *_: argparse.Namespace(subsets=[subset]))
    assert script.training_texts(tmp_path) == ["A red ring.", "white star"]
