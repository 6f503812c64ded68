"""`--data docstrings`: which texts they are, that they are the same in every process, and what reading them imports."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from real import pairs, tasks
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.errors import Gen2EmbedError
from trainers.calibration import CalibrateConfig, read
from trainers.data import docstrings
from trainers.data.docstrings import Docstring, functions, paragraphs
from trainers.data.training_data import DataConfig, open_training_data

MODULE = '''
"""A module."""
import warnings

def zip_up(path):
    """Pack a folder into one file.

    The folder itself stays where it is, and so do its files.
    """

def zip_up_again(path):
    """Pack a folder into one file."""

def _hidden():
    """Do what nobody may see."""

def short():
    """Too short."""

class Box:
    """Box(size)

    Hold things
    of one size.

    Parameters
    ----------
    size : int
    """

class Deprecated(type):
    def __getattribute__(cls, name):
        warnings.warn("is deprecated", DeprecationWarning)
        return super().__getattribute__(name)

class Old(metaclass=Deprecated):
    """Still do what it did."""

NUMBER = 7
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_module_to_read.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "a_module_to_read"
    sys.modules.pop("a_module_to_read", None)


def rows(limit: int | None = None, **options: object) -> dict[str, list[tuple[str, str]]]:
    config = DataConfig(data_dir="docstrings", limit=limit, **options)  # type: ignore[arg-type]
    data = open_training_data(config, Path("never made"))
    return {one.name: [(row.query.text, row.positive.text) for row in one.rows()] for one in data.subsets}


def test_public_functions_and_classes_are_read_once_and_without_a_warning(module):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        found = functions([module])
        assert warnings.filters == before
    assert found == [
        Docstring(f"{module}.Box", "Hold things of one size.", ""),
        Docstring(f"{module}.Old", "Still do what it did.", ""),
        Docstring(
            f"{module}.zip_up",
            "Pack a folder into one file.",
            "The folder itself stays where it is, and so do its files.",
        ),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sort a list.\n\nThe order of equal items is kept as it was before sorting.\n\nParameters\n----------\nx",
         ("Sort a list.", "The order of equal items is kept as it was before sorting.")),
        ("sort(x, *, key=None) -> Tensor\n\nSort a\nlist.\n\nParameters\n----------\nx : int", ("Sort a list.", "")),
        ("Sort.\n\n.. note:: a\n\n>>> sort(x)", ("Sort.", "")),
        ("", ("", "")),
    ],
)  # fmt: skip
def test_paragraphs_of_docstrings(text: str, found: tuple[str, str]) -> None:
    assert paragraphs(text) == found


def test_a_module_that_is_missing_is_named():
    with pytest.raises(Gen2EmbedError, match="the docstrings of no_such_module are needed"):
        functions(["math", "no_such_module"])


def test_two_subsets_of_true_pairs():
    found = rows()
    assert list(found) == ["details", "summaries"]
    details, summaries = dict(found["details"]), dict(found["summaries"])
    assert summaries["heapq.merge"] == "Merge multiple sorted inputs into a single sorted output."
    assert details[summaries["heapq.merge"]].startswith("Similar to sorted(itertools.chain(*iterables)) but returns")
    assert set(details) <= set(summaries.values())
    names = [*docstrings.STANDARD_LIBRARY, *docstrings.DEPENDENCIES]
    assert {name.rpartition(".")[0] for name in summaries} <= set(names)
    assert len(names) == len(set(names))


def test_the_default_gives_two_thousand_distinct_inputs_per_side():
    config = CalibrateConfig(data_dir="docstrings")
    inputs = read(open_training_data(config, Path("never made")), config.limit)
    assert (len(inputs.queries), len(inputs.documents), inputs.rejected) == (2000, 2000, [])
    assert len(set(inputs.queries)) == len(set(inputs.documents)) == 2000
    whole = read(open_training_data(DataConfig(data_dir="docstrings"), Path("never made")), None)
    assert min(len(whole.queries), len(whole.documents)) > 4000


@pytest.mark.exhaustive
@pytest.mark.slow
def test_another_process_reads_the_same_and_imports_nothing_that_a_model_does_not():
    """A second process with another hash seed; of packages that a model does not import, only Python's own are new."""
    code = (
        "import hashlib, json, sys\n"
        "from gen2embed_mteb import Gen2Embed\n"
        "import datasets, trainers.calibration\n"
        "Gen2Embed('gen2embed-mini', device='cpu')\n"
        "from trainers.data import docstrings\n"
        "before = set(sys.modules)\n"
        "tables = docstrings.tables()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "rows = [list(row.values()) for one in tables.values() for row in one.rows(('query', 'positive'))]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest(), *sorted(new - sys.stdlib_module_names))\n"
    )
    here = [list(row) for found in rows().values() for row in found]
    digest = hashlib.sha256(json.dumps(here).encode()).hexdigest()
    root = Path(docstrings.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert ended.stdout.split() == [digest]


def test_no_library_of_the_benchmark_is_read():
    """So a map that is fitted on these texts has seen no text of a task."""
    benchmark = {name.split(".")[0] for half in tasks.HALVES for name in tasks.LIBRARIES[half]}
    assert not benchmark & {name.split(".")[0] for name in (*docstrings.STANDARD_LIBRARY, *docstrings.DEPENDENCIES)}
    shipped = {text for found in rows().values() for pair in found for text in pair}
    for half in tasks.HALVES:
        described = tasks.functions(tasks.LIBRARIES[half])
        assert not shipped & {one.name for one in described}
        used = [one for one in tasks.shuffled(described, half) if one.detail][: tasks.NUM_QUERIES]
        assert not shipped & {text for one in used for text in (one.summary, one.detail)}


def test_the_benchmark_reads_docstrings_by_the_same_code():
    assert tasks.functions is functions is pairs.functions


def test_subsets_and_columns_are_chosen_as_elsewhere():
    assert list(rows(limit=3, subsets=("summaries",))) == ["summaries"]
    turned = rows(limit=3, columns=("positive", "query"))
    assert [pair[::-1] for pair in turned["details"]] == rows(limit=3)["details"]
    with pytest.raises(ValueError, match="details, summaries"):
        rows(subsets=("glosses",))
    with pytest.raises(Gen2EmbedError, match="docstrings has no split 'test'; leave --split out"):
        rows(split="test")
    assert rows(limit=3, split="train") == rows(limit=3)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_python_without_docstrings_is_refused():
    code = "from trainers.data import docstrings; docstrings.tables()"
    command = [sys.executable, "-OO", "-c", code]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(docstrings.__file__).parents[2]
    )
    assert ended.returncode == 1
    assert "python -OO drops all docstrings" in ended.stderr


def test_a_calibrated_folder_loads_as_a_plain_one(tiny_dir, tmp_path, capsys, caplog):
    words = ["calibrate", str(tiny_dir("qwen2_vl")), str(tmp_path / "out"), "--data", "docstrings", "--limit", "120"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "queries       120" in printed
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["data"] == "docstrings"
    assert "docstrings has texts alone, and the model takes images" in caplog.text
    plain, ours = SentenceTransformer(str(tmp_path / "out"), device="cpu"), Gen2Embed(tmp_path / "out", device="cpu")
    texts = ["a red circle", "Return the sum."]
    for side in ("query", "document"):
        vectors = [getattr(model, f"encode_{side}")(texts) for model in (plain, ours)]
        assert np.abs(vectors[0] - vectors[1]).max() < 1e-6


def test_a_model_of_text_alone_gets_no_warning(tiny_dir, tmp_path, caplog):
    words = ["calibrate", str(tiny_dir("llama")), str(tmp_path / "out"), "--data", "docstrings", "--limit", "120"]
    assert cli.main(words) == 0
    assert "texts alone" not in caplog.text


def test_sample_takes_the_name_too_and_records_it(tmp_path, capsys):
    output = tmp_path / "saha"
    words = ["sample", "--model_name", "gen2embed-mini", "--data_dir", "docstrings", "--output_dir", str(output)]
    more = ["--method", "hn", "--num_hard_negatives", "3", "--pool_multiplier", "2", "--limit", "20"]
    assert cli.main([*words, *more]) == 0
    record = json.loads((output / "details.json").read_text())
    assert record["data"]["data_dir"] == "docstrings"
    config = DataConfig.of_records([record])
    (subset,) = open_training_data(config, tmp_path / "images").subsets
    assert [row.query.text for row in subset.rows()] == [pair[0] for pair in rows(limit=20)["details"]]


def test_the_guide_shows_the_figures_of_the_record():
    root = Path(docstrings.__file__).parents[2]
    record = json.loads((root / "benchmarks" / "results" / "docstring_calibration.json").read_text())
    page = (root / "docs" / "guides" / "calibrate.md").read_text(encoding="utf-8")
    assert record["inputs_shared_with_the_tasks"] == 0
    for prompt, runs in record["runs"].items():
        cells = [f"`{prompt}`", f"{100 * runs['none']['reported'][0]:.1f}"]
        for name in ("docstrings", "other tasks"):
            gain, low, high = (100 * value for value in runs[name]["reported, gain"])
            cells.append(f"{100 * runs[name]['reported'][0]:.1f}, {gain:+.1f} [{low:+.1f}, {high:+.1f}]")
        assert f"| {' | '.join(cells)} |" in page

    names = ("verb-gloss-word", "verb-word-gloss", "adjective-synonym", "noun-hypernym")
    means = {
        (prompt, name): f"{100 * sum(run['tasks'][task] for task in names) / 4:.1f}"
        for prompt, runs in record["runs"].items()
        for name, run in runs.items()
    }
    text = " ".join(page.split())
    for prompt in record["runs"]:
        assert f"from {means[prompt, 'none']} to {means[prompt, 'docstrings']} (`{prompt}`)" in text
    assert f"{means['system', 'other tasks']} and {means['hierarchical', 'other tasks']}." in text
