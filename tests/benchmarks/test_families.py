"""The record of the families: it names every family that the tests know, and the pages show it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny_any import ANY
from tiny_models import FAMILIES
from tiny_torchvision import TORCHVISION

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("families", ROOT / "benchmarks" / "families.py")
families = importlib.util.module_from_spec(SPEC)
sys.modules["families"] = families
SPEC.loader.exec_module(families)


@pytest.fixture(scope="module")
def record():
    return json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())


def test_every_family_was_put_through_every_check(record):
    assert set(record["families"]) == {*FAMILIES, *ANY, *TORCHVISION, families.PHI}
    for name, found in {**record["families"], **record["real"]}.items():
        assert len(found["checks"]) == 9, name
        assert all(passed for passed, _ in found["checks"].values()), name
        assert found["export"] is None if found["type"] == families.PHI else found["export"] < 1e-5, name
        assert found["gradients"] < 5e-5, name


def test_the_pages_show_the_record(record):
    for page, table in families.tables(record).items():
        assert f"<!-- families table -->\n\n{table}\n<!-- end of the table -->" in (ROOT / page).read_text(), page


@pytest.mark.parametrize("name", ["internvl", "llama"])
@pytest.mark.slow
def test_what_is_recorded_is_found_again(record, tmp_path, name):
    found = families.facts(families.write(name, tmp_path / name))
    recorded = record["families"][name]
    assert {check: passed for check, (passed, _) in found["checks"].items()} == dict.fromkeys(recorded["checks"], True)
    assert found["export"] < 1e-5
    assert found["gradients"] < 1e-5


def test_a_command_is_recorded_without_folders_of_this_machine():
    assert families._FOLDER.sub("", "--real a=/x/y:z --output /b/c.json d/e") == "--real a=y:z --output c.json d/e"
