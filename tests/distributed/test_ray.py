"""The Ray engine on a real Ray cluster of several nodes on this machine; `pip install 'gen2embed[ray]'` to run these.

Every node has one CPU, so that each worker is on another node.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from encode_jobs import content, job_of, write_lines
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb import cli
from gen2embed_mteb.bulk.encoder import BATCHES_PER_SHARD, BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.distributed.encoder import RayEncoder
from gen2embed_mteb.distributed.pool import Needs, RayPool, connect
from gen2embed_mteb.encode_command.driver import run_job
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.source import ImageSource

pytest.importorskip("ray")
pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]
ITEMS = [Item(f"text {number:03}") for number in range(8 * BATCHES_PER_SHARD)]
NUM_SHARDS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each; their processes find the tests' helpers."""
    with pytest.MonkeyPatch.context() as patch:
        path = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        made.add_node(num_cpus=1)
        ray, _ = connect(made.address)
        yield made
        ray.shutdown()
        made.shutdown()


class Run:
    """One run over `ITEMS` with the workers of a pool, in shards of `BATCHES_PER_SHARD` calls of the encoder."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.folder, self.log = folder, folder / "log"
        ray, _ = connect("")
        self.pool = RayPool(ray, "ray_workers:open_worker", {"log": str(self.log), **arguments}, Needs())
        self.store = EmbeddingStore(folder / "e", {"f": "1"})
        encoder = RayEncoder(PlainEncoder(), self.pool)
        self.bulk = BulkEncoder(encoder, self.store, ImageSource(folder), batch_size=1, num_workers=1)

    def calls(self) -> list[int]:
        """The process of each call of an encoder."""
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def when(self, num_calls: int, act: Any) -> threading.Thread:
        """Start a thread that acts once the encoders were called so often."""

        def wait() -> None:
            deadline = time.monotonic() + 120
            while len(self.calls()) < num_calls and time.monotonic() < deadline:
                time.sleep(0.02)
            act()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "." and path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process without Ray stores."""
    folder = tmp_path_factory.mktemp("whole")
    bulk = BulkEncoder(PlainEncoder(), EmbeddingStore(folder / "e", {"f": "1"}), ImageSource(folder), batch_size=1)
    bulk.add("query", ITEMS)
    return stored(folder / "e")


def test_two_workers_make_the_bytes_of_one_process(cluster, tmp_path: Path, whole: dict[str, bytes]) -> None:
    run = Run(tmp_path, delay=0.02)
    run.bulk.add("query", ITEMS)
    assert stored(tmp_path / "e") == whole
    assert len(run.calls()) == run.bulk.num_encoded == len(ITEMS)
    assert len(set(run.calls())) == len(run.pool.state.done) == 2
    assert sum(run.pool.state.done.values()) == NUM_SHARDS
    run.bulk.add("query", ITEMS)  # nothing is missing, nobody is asked
    run.bulk.add("document", ITEMS[:3])  # the same workers go on
    assert len(run.calls()) == len(ITEMS) + 3
    assert len(run.pool.state.done) == 2
    assert [path.name for path in (tmp_path / "e").iterdir() if path.name.endswith("tmp")] == []
    run.pool.close()


def test_a_killed_worker_costs_at_most_one_shard(cluster, tmp_path: Path, whole: dict[str, bytes], caplog) -> None:
    run = Run(tmp_path, delay=0.05)
    killed: list[int] = []

    def kill() -> None:
        killed.append(run.calls()[-1])
        os.kill(killed[0], signal.SIGKILL)

    thread = run.when(2 * BATCHES_PER_SHARD + 5, kill)
    run.bulk.add("query", ITEMS)
    thread.join()
    assert stored(tmp_path / "e") == whole
    assert run.pool.state.num_lost == 1
    assert len(set(run.calls())) == 3  # the dead one was replaced
    lost = len(run.calls()) - len(ITEMS)
    # The calls that were lost with the worker, and the inputs of three batches that were tried one by one.
    assert 0 < lost <= BATCHES_PER_SHARD + 3
    assert "died; what it was doing is done again by another" in caplog.text
    run.pool.close()


def test_nodes_come_and_go_in_mid_run(cluster, tmp_path: Path, whole: dict[str, bytes]) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    run = Run(tmp_path, hold=str(hold))
    thread = threading.Thread(target=run.bulk.add, args=("query", ITEMS))  # Ray adds nodes in the main thread only
    thread.start()
    run.when(2, lambda: None).join()
    added = cluster.add_node(num_cpus=1)
    run.when(3, lambda: None).join()  # both wait with their first batch, so the third call is the new node's
    cluster.remove_node(added, allow_graceful=False)
    hold.unlink()
    thread.join()
    assert len(set(run.calls())) >= 3
    assert stored(tmp_path / "e") == whole
    run.pool.close()


def test_an_input_that_kills_workers_is_named(cluster, tmp_path: Path, whole: dict[str, bytes]) -> None:
    run = Run(tmp_path, deadly="text 045")
    with pytest.raises(Gen2EmbedError, match=r"2 workers died with this input, run alone: query 'text 045'\. .*take"):
        run.bulk.add("query", ITEMS)
    run.pool.close()
    again = Run(tmp_path)
    again.bulk.add("query", ITEMS)
    assert stored(tmp_path / "e") == whole
    again.pool.close()


def test_errors_of_a_worker_are_those_of_the_run(cluster, tmp_path: Path) -> None:
    run = Run(tmp_path, surprise=1)
    with pytest.raises(TypeError, match="surprise"):
        run.bulk.add("query", ITEMS)
    run.pool.close()


DATA = ["--model_name", "gen2embed-mini", "--batch_size", "2", "--device", "cpu"]


def run_as(words: list[str], rank: int, world_size: int) -> subprocess.Popen:
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "gen2embed_mteb.cli", *words], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL
    )


def three_ways(words: list[str], folder: Path) -> list[Path]:
    """Runs a command in one process, in two, and with two Ray workers; the three output folders."""
    folders = [folder / name for name in ("one", "two", "ray")]
    out = [[*words, "--output_dir", str(path)] for path in folders]
    assert cli.main(out[0]) == 0
    processes = [run_as(out[1], rank, 2) for rank in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert cli.main([*out[2], "--engine", "ray", "--num_actors", "2"]) == 0
    return folders


def test_evaluate_gives_the_same_bytes_in_all_three_ways(cluster, tmp_path: Path) -> None:
    words = ["evaluate", "--benchmark", "mmeb-mini", "--subsets", "ColorShape", "--limit", "40", *DATA]
    folders = three_ways(words, tmp_path)
    first, *others = [stored(folder / "embeddings") for folder in folders]
    assert len(first) > 6
    assert all(other == first for other in others)
    scores = {(folder / "ColorShape_score.json").read_bytes() for folder in folders}
    tables = {(folder / "results.md").read_bytes() for folder in folders}
    assert len(scores) == len(tables) == 1


def test_sample_gives_the_same_bytes_in_all_three_ways(cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "img")
    lines = [f'{{"query": "which colour is {n % 7}", "positive": "answer {n}"}}\n' for n in range(48)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    words = ["sample", "--data_dir", str(tmp_path / "pairs.jsonl"), *DATA, "--num_hard_negatives", "3"]
    folders = three_ways([*words, "--search_block", "16"], tmp_path)
    first, *others = [stored(folder / "embeddings") for folder in folders]
    assert len(first) > 4
    assert all(other == first for other in others)
    searches = [stored(folder / "search") for folder in folders]
    assert len(searches[0]) == 2 + 9  # the two files of vectors, three blocks of queries and as many of candidates
    assert searches[1] == searches[2] == searches[0]
    assert cli.main([*words, "--output_dir", str(tmp_path / "plain")]) == 0  # one search without jobs
    folders.append(tmp_path / "plain")
    assert len({next(folder.glob("*.parquet")).read_bytes() for folder in folders}) == 1


def test_encode_gives_the_same_bytes_in_all_three_ways(cluster, tmp_path: Path) -> None:
    write_images(tmp_path / "img")
    pictures = sorted(path.name for path in (tmp_path / "img").iterdir())
    rows = [{"id": f"r{n}", "text": f"text {n % 31}", "image": pictures[n % 5] if n % 3 else None} for n in range(70)]
    write_lines(tmp_path / "rows.jsonl", rows)
    words = ["encode", "--input", str(tmp_path / "rows.jsonl"), "--image_dir", str(tmp_path / "img"), *DATA]
    folders = three_ways([*words, "--rows_per_shard", "16"], tmp_path)
    first, *others = map(content, folders)
    assert sum(name.startswith("part-") for name in first) == 5
    assert all(other == first for other in others)


def test_a_part_that_kills_workers_is_named(cluster, tmp_path: Path) -> None:
    rows = [{"text": f"text {n}"} for n in range(30)]
    job = job_of(write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out", rows_per_shard=10)
    ray, _ = connect("")
    arguments = {"log": str(tmp_path / "log"), "deadly": "text 14"}
    pool = RayPool(ray, "ray_workers:open_worker", arguments, Needs())
    with pytest.raises(Gen2EmbedError, match="3 workers died with rows 10 to 19 of the input"):
        run_job(RayEncoder(PlainEncoder(), pool), job)
    pool.close()
    pool = RayPool(ray, "ray_workers:open_worker", {"log": str(tmp_path / "log")}, Needs())
    run = run_job(RayEncoder(PlainEncoder(), pool), job)
    assert (run.num_parts, run.checked, run.num_rows) == (3, {0, 1, 2}, 30)
    pool.close()
    other = job_of(tmp_path / "rows.jsonl", tmp_path / "here", rows_per_shard=10)
    run_job(PlainEncoder(), other)
    assert stored(tmp_path / "out") == stored(tmp_path / "here")
