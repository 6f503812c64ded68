"""Worker processes: the same bits as threads, faults set aside, deaths survived, and no process left behind."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from split_encoder import DeadlyImages, SplitPlainEncoder, children

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.preparation import Helpers
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Fault, Item, Opener
from gen2embed_mteb.bulk.workers import Workers, WorkersError
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mteb_plugin.models.inputs import HeldImages

HELPERS = Path(__file__).parents[1] / "helpers"
SCRIPT = HELPERS / "run_split.py"
NUM_PICTURES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        height, width = random.integers(28, 60, 2)
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    for name in ("deadly", "hang", "system"):
        Image.new("RGB", (30, 30)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:-400])
    return folder


def items(*more: str) -> list[Item]:
    texts = [Item("word " * (number % 5)) for number in range(5)]
    return [
        *texts,
        *(Item("a" * number, (f"{number}.png",)) for number in range(NUM_PICTURES)),
        Item("two", ("1.png", "2.png")),
        *(Item("", (f"{name}.png",)) for name in more),
    ]


def encoded(
    images: Any, place: Path, given: list[Item], num_workers: int, **options: Any
) -> tuple[np.ndarray, dict[str, Fault], Any]:
    """The vectors of all items that have one, the faults of the others by the names of their images, the encoder."""
    encoder, patience = options.get("encoder") or SplitPlainEncoder(), options.get("patience")
    bulk = BulkEncoder(encoder, EmbeddingStore(place, {}), images, num_workers=num_workers, batch_size=4)
    if patience is not None:
        opener = Opener(images, ImageOptions())
        bulk._helpers._workers = Workers(num_workers, opener, encoder.preparer(), patience=patience)
    bulk.add("query", given)
    faults = {item.images[0]: fault for item in given if (fault := bulk.fault("query", item)) is not None}
    return bulk.vectors("query", [item for item in given if bulk.fault("query", item) is None]), faults, encoder


def test_any_number_of_workers_gives_the_bits_of_threads(folder: Path, tmp_path: Path) -> None:
    images, given = ImageSource(folder), items("broken", "missing")
    expected, faults, encoder = encoded(images, tmp_path / "0", given, 0)
    assert encoder.processes == {os.getpid()}
    assert set(faults) == {"broken.png", "missing.png"}
    for count in (1, 2):
        vectors, same_faults, encoder = encoded(images, tmp_path / str(count), given, count)
        assert np.array_equal(vectors, expected)
        assert same_faults == faults
        assert len(encoder.processes) in range(1, count + 1)
        assert os.getpid() not in encoder.processes
        assert {path.name for path in (tmp_path / str(count)).iterdir()} == {
            path.name for path in (tmp_path / "0").iterdir()
        }
        assert not set(children(os.getpid()))  # they ended with the object


def test_texts_alone_start_no_process(folder: Path, tmp_path: Path) -> None:
    _, _, encoder = encoded(ImageSource(folder), tmp_path, items()[:5], 2)
    assert encoder.processes == {os.getpid()}


def test_a_picture_that_kills_its_worker_is_set_aside(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = items("deadly", "broken")
    expected, _, _ = encoded(DeadlyImages(folder), tmp_path / "0", given, 0)  # there it cannot be opened
    with caplog.at_level(logging.WARNING):
        vectors, faults, _ = encoded(DeadlyImages(folder), tmp_path / "2", given, 2)
    assert np.array_equal(vectors, expected)
    assert faults["deadly.png"] == Fault("deadly.png", "the process that prepared it ended by SIGSEGV")
    assert faults["broken.png"].reason.startswith("damaged")
    first, second = [record.getMessage() for record in caplog.records]
    assert "SIGSEGV, at deadly.png; " in first
    assert first.endswith("are tried one by one")
    assert second.endswith("again, at deadly.png; this input is set aside")


@pytest.mark.exhaustive
def test_a_worker_that_hangs_is_ended(folder: Path, tmp_path: Path) -> None:
    given = [*items()[8:11], Item("", ("hang.png",))]
    expected, _, _ = encoded(DeadlyImages(folder), tmp_path / "0", given, 0)
    vectors, faults, _ = encoded(DeadlyImages(folder), tmp_path / "1", given, 1, patience=1.0)
    assert np.array_equal(vectors, expected)
    assert faults == {"hang.png": Fault("hang.png", "preparing it took longer than 1 s")}


def test_a_worker_that_is_killed_from_outside_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    expected, _, _ = encoded(ImageSource(folder), tmp_path / "0", items(), 0)

    class Killing(SplitPlainEncoder):
        killed = 0

        def encode_prepared(self, side: str, batch: Any) -> np.ndarray:
            for process in children(os.getpid()):
                if self.killed < 2:
                    os.kill(process, signal.SIGKILL)
                    self.killed += 1
            return super().encode_prepared(side, batch)

    vectors, faults, encoder = encoded(ImageSource(folder), tmp_path / "2", items(), 2, encoder=Killing())
    assert encoder.killed == 2
    assert np.array_equal(vectors, expected)
    assert not faults


@pytest.mark.exhaustive
def test_a_batch_that_is_too_large_for_a_worker_is_halved(folder: Path, tmp_path: Path) -> None:
    vectors, faults, encoder = encoded(ImageSource(folder), tmp_path, items()[5:], 1, encoder=SplitPlainEncoder(most=2))
    assert len(vectors) == NUM_PICTURES + 1
    assert not faults
    assert max(encoder.sizes) == 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("system", OSError, "Input/output error"),
        pytest.param(
            *("bug", RuntimeError, "(?s)in a worker process:.*KeyError: 'a bug'"), marks=pytest.mark.exhaustive
        ),
    ],
)
def test_an_error_of_the_system_or_a_defect_ends_the_run(
    folder: Path, tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    given = [*items()[5:9], Item(name if name == "bug" else "", ("system.png" if name == "system" else "1.png",))]
    with pytest.raises(error, match=message):
        encoded(DeadlyImages(folder), tmp_path, given, 1)
    assert not set(children(os.getpid()))


def test_inputs_that_the_encoder_refuses_are_set_aside(folder: Path, tmp_path: Path) -> None:
    given = [*items()[5:9], Item("refuse", ("1.png",))]
    expected, faults, _ = encoded(ImageSource(folder), tmp_path / "0", given, 0)
    vectors, same_faults, _ = encoded(ImageSource(folder), tmp_path / "1", given, 1)
    assert np.array_equal(vectors, expected)
    assert same_faults == faults == {"1.png": Fault("", "refused by the encoder: a text that is refused")}


class Unsendable(ImageSource):
    def __reduce__(self) -> Any:
        raise TypeError("an open socket")


def test_what_cannot_be_sent_is_an_error_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkersError, match=r"sent to them .an open socket.; pass --num_workers 0"):
        encoded(Unsendable(folder), tmp_path, items(), 1)


@pytest.mark.parametrize(
    ("device", "num_images", "cores", "started"),
    [("cpu", 10**6, 9, 0), ("gpu", 10, 9, 0), ("gpu", 1000, 9, 4), ("gpu", 1000, 3, 2), ("gpu", 1000, 1, 0)],
)
def test_workers_start_by_themselves_where_they_pay(
    device: str, num_images: int, cores: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU, for many images, and where a core is left for them."""
    monkeypatch.setattr("gen2embed_mteb.bulk.preparation.cores_per_process", lambda: cores)
    monkeypatch.setattr(Workers, "start", lambda _: None)
    encoder = SplitPlainEncoder()
    encoder.computes_on_cpu = device == "cpu"
    found = Helpers(None, Opener(HeldImages(), ImageOptions())).for_inputs(encoder, num_images)
    assert (found.count if found else 0) == started


def test_workers_that_cannot_start_are_done_without_unless_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Workers) -> None:
        raise WorkersError("no")

    monkeypatch.setattr("gen2embed_mteb.bulk.preparation.cores_per_process", lambda: 9)
    monkeypatch.setattr(Workers, "start", fail)
    encoder, opener = SplitPlainEncoder(), Opener(ImageSource(folder), ImageOptions())
    encoder.computes_on_cpu = False
    assert Helpers(None, opener).for_inputs(encoder, 1000) is None
    with pytest.raises(Gen2EmbedError, match="no"):
        Helpers(1, opener).for_inputs(encoder, 1)


def program(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def some(tmp_path: Path) -> Path:
    for number in range(40):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def test_a_program_without_a_main_guard_can_use_workers(some: Path) -> None:
    process = program(some, "2")
    assert process.communicate(timeout=60) == ("done\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, -15, marks=pytest.mark.exhaustive),
    ],
)
def test_workers_end_with_the_process_that_started_them(some: Path, number: int, status: int) -> None:
    """Ctrl-C, a kill, and the end by a scheduler, while batches are encoded."""
    process = program(some, "2", "0.5")
    wait_until(lambda: len(set(children(process.pid))) == 2 and any((some / "e").glob("*.json")))
    workers = set(children(process.pid))
    time.sleep(1)  # in the middle of batches
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert not out
    assert err == ("\nencode: interrupted; run the same command again to go on\n" if number == signal.SIGINT else "")
    wait_until(lambda: not any(alive(worker) for worker in workers), seconds=5)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.exhaustive
def test_memory_holds_few_batches_whatever_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    """No more batches are asked for than may be prepared ahead."""
    most, waiting, lock = 0, 0, threading.Lock()

    class Counting(SplitPlainEncoder):
        def completed(self, side: str, arrays: Any) -> Any:
            nonlocal most, waiting
            with lock:
                waiting += 1
                most = max(most, waiting)
            return super().completed(side, arrays)

        def encode_prepared(self, side: str, batch: Any) -> np.ndarray:
            nonlocal waiting
            time.sleep(0.02)
            with lock:
                waiting -= 1
            return super().encode_prepared(side, batch)

    given = [Item(f"{number}", (f"{number % NUM_PICTURES}.png",)) for number in range(80)]
    encoded(ImageSource(folder), tmp_path, given, 2, encoder=Counting())
    assert most <= 4  # one more than there are workers, and the one that is encoded
