"""`gen2embed sample` and `gen2embed inspect` as people type them, on gen2embed-mini and MMEB-mini's training sets."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from gen2embed_mteb import cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.tasks import tasks
from trainers.sampling.files import read_sampling

pytestmark = pytest.mark.slow

SUBSETS = ("Digits", "Scenes_t2i")
ROWS = 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with a small MMEB-mini in it: two training sets of 20 rows."""
    home = tmp_path_factory.mktemp("cache")
    small = [replace(task, num_train=ROWS) for task in tasks(benchmark.train_digits)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "tasks", lambda _: small)
        patch.setenv("XDG_CACHE_HOME", str(home))
        benchmark.ensure("train")
    return home


@pytest.fixture
def data(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return benchmark.default_root() / "MMEB-train"


def words(data, output, *more):
    begin = ["sample", "--model-name", "gen2embed-mini", "--data_dir", str(data), "--output_dir", str(output)]
    # Small batches: many shards, so that a kill finds work half done.
    small = ["--num_hard_negatives", "3", "--pool_multiplier", "2", "--batch_size", "1", "--subsets", *SUBSETS]
    return [*begin, *small, *more]


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The files of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        assert cli.main(words(benchmark.default_root() / "MMEB-train", output)) == 0
    return output


def test_sample_writes_clusters_of_every_row(whole):
    assert sorted(path.stem for path in whole.glob("*.parquet")) == sorted(SUBSETS)
    for name in SUBSETS:
        sampling = read_sampling(whole / f"{name}.parquet", methods=("saha",))
        clusters = sampling.clusters
        assert np.union1d(clusters.anchors, clusters.members[clusters.members >= 0]).tolist() == list(range(ROWS))
        assert sampling.record["model"]["name"] == "gen2embed-mini"
        assert sampling.record["model"]["prompt_mode"] == "hierarchical"
        assert len(sampling.record["model"]["fingerprint"]) == 64


def finished_shards(folder):
    """When each shard that has its completion marker was written; a killed run may leave one without."""
    shards = [marker.with_suffix(".npy") for marker in folder.glob("*.json")] if folder.is_dir() else []
    return {shard.name: shard.stat().st_mtime_ns for shard in shards if shard.is_file()}


def test_killed_and_started_again_it_ends_in_the_same_bytes(data, whole, tmp_path, capsys, preloaded):
    output = tmp_path / "killed"
    # The number of threads is part of what decides the last bits of a product.
    threads = str(torch.get_num_threads())
    process = preloaded.start(["-m", "gen2embed_mteb.cli", *words(data, output)], OMP_NUM_THREADS=threads)
    shards = output / "embeddings"
    while not process.ended() and len(finished_shards(shards)) < 3:
        time.sleep(0.01)
    process.kill()
    assert not all((output / f"{name}.json").exists() for name in SUBSETS)
    made = finished_shards(shards)
    assert made
    assert cli.main(words(data, output, "--resume")) == 0
    assert cli.main(words(data, output)) == 0
    assert "2 of 2 subsets were finished before" in capsys.readouterr().out
    for name in SUBSETS:
        assert (output / f"{name}.parquet").read_bytes() == (whole / f"{name}.parquet").read_bytes()
    assert finished_shards(shards).items() >= made.items()


def test_the_methods_share_vectors_and_mmeb_mini_is_a_name(data, whole, tmp_path, capsys):
    for method in ("hn", "hn-beta", "in-batch"):
        more = ["--method", method, "--embedding_dir", str(whole / "embeddings")]
        assert cli.main(words("mmeb-mini", tmp_path / method, *more)) == 0
        record = json.loads((tmp_path / method / "Scenes_t2i.json").read_text())
        assert (record["method"], record["counts"]["clusters"]) == (method, ROWS)
        assert record["data"]["data_dir"] == "mmeb-mini"
    printed = capsys.readouterr().out
    assert "candidates" in printed
    assert "total" in printed
    page = tmp_path / "page.html"
    file = tmp_path / "hn" / "Scenes_t2i.parquet"
    assert cli.main(["inspect", str(file), "--output", str(page), "--num_clusters", "4"]) == 0
    assert page.read_text().count("class='cluster'") == 4
    assert str(page) in capsys.readouterr().out


def test_a_missing_image_fails_the_run_past_the_rate_and_not_below(data, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "images" / "Digits" / "Train" / "00000.png").unlink()
    only = ("--subsets", "Digits", "--limit", "6")
    assert cli.main(words(copy, tmp_path / "strict", *only)) == 1
    assert capsys.readouterr().out.endswith(
        "\nFailed: 1 of 6 rows were set aside, see errors.jsonl; that is more than --max_error_rate 0.001\n"
    )
    assert cli.main(words(copy, tmp_path / "strict", *only, "--max_error_rate", "0.5")) == 0
    assert capsys.readouterr().out.endswith("\n1 of 6 rows were set aside, see errors.jsonl\n")
    assert json.loads((tmp_path / "strict" / "Digits.json").read_text())["counts"]["errors"] == 1


WRONG = {
    "num_hard_negatives is 0": ["--num_hard_negatives", "0"],
    "unknown subset 'Colours'": ["--subsets", "Colours"],
    "neither MMEB-train's form": ["--split", "diverse"],
    "unknown prompt_mode 'hierarchic'": ["--prompt_mode", "hierarchic"],
    "method was 'saha', now 'hn'": ["--method", "hn"],
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_input_says_what_to_do_and_exits_with_2(said, data, whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.glob("*.*")}
    assert cli.main(words(data, whole, *WRONG[said])) == 2
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in whole.glob("*.*")} == before


def test_inspect_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none.parquet")]) == 2
    assert "gen2embed sample" in capsys.readouterr().err
