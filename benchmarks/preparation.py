"""Times how pictures are prepared for a model: opened, resized, cut into patches; their texts rendered and tokenized.

    python benchmarks/preparation.py --output benchmarks/results/preparation.json

The pictures are the photographs that ship with scikit-learn (and with scikit-image, if it is installed), as JPEGs of
several sizes, each with a question; the processor is Qwen2-VL's, with its published limits. Compared in one run:

- `floor`: decode the JPEG and resize it to the size that the model gets. Whoever prepares pictures must do that.
- `stock`: transformers' own processor on pictures that Pillow opened, in one process: what a plain loop does.
- `threads`: `--num_workers 0`, and `1 worker`, `2 workers`: what `gen2embed evaluate` and `sample` do before the model
  runs; with workers, their arrays are received and laid out by this process.

Time by the clock needs a machine that does nothing else; processor time is that of this process and the workers. Each
ratio is the median of those of the rounds, since one round sees the same machine. `one core / floor` compares times by
the clock while this process and its worker share one core (Linux), with the floor before and after in every round: two
cores of a virtual machine may differ by a factor of two. `processor time / floor` is the sum over two cores.
On a GPU the bytes of patches are looked up there; here this process does it, which is timed apart, as `lookup`.
The memory that a worker has for itself is read at the end.
The pixels of all batches are compared with the stock processor's. No model runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoding import common_words, machine, write_base
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.preparation import InProcesses, InThreads, Work
from gen2embed_mteb.bulk.types import Opener
from gen2embed_mteb.bulk.workers import Workers
from gen2embed_mteb.demo.run import load_photos
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.preparation.compact_patches import PIXELS
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.storage.developer_files import write_json

SIZES = ((384, 256), (512, 384), (768, 512), (1024, 768), (1536, 1024))
TARGETS = {"two workers / stock": 1.8, "two workers / one": 1.8, "one core / floor": 1.5}
SIDE: Any = "query"
WALL, CPU = 0, 1
"""Of the two times of a way: by the clock, and of all cores together."""


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(arguments, Path(scratch))
    print(as_text(table(record)))
    write_json(arguments.output, record)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time each way some times, one after the other in every round, so that all see the same machine."""
    model = Gen2Embed(write_base(scratch / "base", "65M"), device="cpu")
    batches = write_pictures(scratch, arguments)
    images = ImageSource(scratch)
    works = [[Work(text, (images.facts(path).digest,), (path,)) for text, path in batch] for batch in batches]
    ways: dict[str, Callable[[], list[Any]]] = {
        "floor": lambda: [floor(model, scratch, batch) for batch in batches],
        "stock": lambda: [stock(model, scratch, batch) for batch in batches],
    }
    encoder, crews = PrefixEncoder(model), {}
    ways["threads"] = lambda: run(InThreads(encoder, SIDE, opener(scratch)), works)
    for count in (1, 2):
        crew = crews[count] = Workers(count, opener(scratch), encoder.preparer())
        ways[f"{count} worker{'s' * (count > 1)}"] = lambda crew=crew: run(InProcesses(encoder, SIDE, crew), works)
    expected = [one[PIXELS] for one in ways["stock"]()]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    lookups, equal, load = [], {}, os.getloadavg()
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            (wall, cpu), made = timed(way, crews[int(name[0])] if name[0].isdigit() else None)
            if repeat:  # the first round is not counted: workers start in it
                times[name].append((wall, cpu))
            if isinstance(made[0], tuple):
                lookup, pixels = timed(lambda made=made: [pixels_of(ready.prepared) for ready in made], None)
                equal[name] = equal.get(name, True) and all(map(torch.equal, pixels, expected))
                if name == "1 worker" and repeat:
                    lookups.append(lookup[1])
    alone = on_one_core(ways["floor"], ways["1 worker"], crews[1], arguments.repeats)
    memory = worker_mib(crews[2])
    for crew in crews.values():
        crew.stop()
    number = sum(len(batch) for batch in batches)
    lookup_ms = 1e3 * statistics.median(lookups) / number
    parts = {name: figures(found, number) for name, found in times.items()}

    def ratio(of: str, to: str, column: int) -> float:
        """The median over the rounds; within one, both saw the same machine."""
        pairs = zip(times[of], times[to], strict=True)
        return round(statistics.median(one[column] / other[column] for one, other in pairs), 2)

    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": arguments.seed,
        "versions": installed_versions(),
        "machine": {**machine("cpu"), "cores": os.cpu_count(), "load": [load[0], os.getloadavg()[0]]},
        "pictures": number,
        "sizes": SIZES,
        "ways": parts,
        "lookup_ms_per_picture": round(lookup_ms, 2),
        "worker_mib": memory,
        "equal_to_stock": equal,
        "ratios": {
            "two workers / stock": ratio("stock", "2 workers", WALL),
            "two workers / one": ratio("1 worker", "2 workers", WALL),
            "one core / floor": round(statistics.median(alone), 2),
            "processor time / floor": ratio("1 worker", "floor", CPU),
            "processor time with lookup / floor": round(
                ratio("1 worker", "floor", CPU) + lookup_ms / parts["floor"]["cpu_ms_per_picture"], 2
            ),
        },
        "one_core_rounds": [round(one, 2) for one in alone],
        "targets": TARGETS,
    }


def write_pictures(scratch: Path, arguments: argparse.Namespace) -> list[list[tuple[str, str]]]:
    """Write JPEGs, and return their questions and names in batches of like size, largest first."""
    rng, words = np.random.default_rng(arguments.seed), common_words()
    photos = list(photographs())
    rows = []
    for number in range(arguments.num_images):
        photo, size = photos[number % len(photos)], SIZES[number % len(SIZES)]
        left, top = int(rng.integers(0, photo.width // 8)), int(rng.integers(0, photo.height // 8))
        name = f"{number}.jpg"
        photo.crop((left, top, photo.width, photo.height)).resize(size).save(scratch / name, quality=90)
        rows.append((f"<|image_1|>\nRepresent the given image: {' '.join(rng.choice(words, 8))}?\n", name, size))
    rows.sort(key=lambda row: (-row[2][0], row[1]))
    listed = [(text, name) for text, name, _ in rows]
    return [listed[start : start + arguments.batch_size] for start in range(0, len(listed), arguments.batch_size)]


def photographs() -> Iterator[Image.Image]:
    """Yield the photographs that are installed."""
    yield from load_photos().values()
    try:
        from skimage import data
    except ImportError:
        return
    for name in ("astronaut", "coffee", "chelsea"):
        yield Image.fromarray(getattr(data, name)())


def opener(folder: Path) -> Opener:
    """Return what opens the pictures; no bytes are kept that were read before."""
    return Opener(ImageSource(folder), ImageOptions())


def floor(model: Gen2Embed, folder: Path, batch: list[tuple[str, str]]) -> None:
    """Decode and resize."""
    size = model.processor.image_processor.size
    for _, name in batch:
        picture = Image.open(folder / name).convert("RGB")
        height, width = smart_resize(picture.height, picture.width, 28, size["shortest_edge"], size["longest_edge"])
        picture.resize((width, height), Image.Resampling.BICUBIC)


def stock(model: Gen2Embed, folder: Path, batch: list[tuple[str, str]]) -> Any:
    """Open the pictures, and hand them with rendered texts to transformers' processor."""
    pictures = [Image.open(folder / name).convert("RGB") for _, name in batch]
    texts = [model.render({"text": text, "image": Image.new("RGB", (28, 28))}, SIDE) for text, _ in batch]
    return model.processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def run(preparation: Any, batches: list[list[Work]]) -> list[Any]:
    """Prepare all batches as the pipeline does, without a model that would wait for them."""
    pending: deque[Any] = deque()
    done = []
    for works in batches:
        if len(pending) > preparation.lookahead:
            done.append(pending.popleft().result())
        pending.append(preparation.submit(works))
    done += [future.result() for future in pending]
    preparation.end(at_once=False)
    return done


def pixels_of(batch: Any) -> torch.Tensor:
    """Return the patches of a prepared batch in the form that the model takes."""
    pixels = batch.others[PIXELS]
    return pixels if batch.patches is None else batch.patches.expanded(pixels)


def timed(call: Callable[[], list[Any]], crew: Workers | None) -> tuple[tuple[float, float], list[Any]]:
    """Return the seconds by the clock, and of all cores together, that a call takes, and its result."""
    started, before = time.perf_counter(), cpu_seconds(crew)
    made = call()
    return (time.perf_counter() - started, cpu_seconds(crew) - before), made


def cpu_seconds(crew: Workers | None) -> float:
    """Return the processor time of this process and of its workers."""
    total = time.process_time()
    for worker in crew._crew._running if crew is not None and crew._crew is not None else ():
        fields = Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def on_one_core(floor: Callable[[], Any], way: Callable[[], Any], crew: Workers, repeats: int) -> list[float]:
    """Return for some rounds how many times the floor's time by the clock a way takes, all on one core."""
    allowed = os.sched_getaffinity(0)
    pin({max(allowed)}, crew)
    ratios = []
    for _ in range(repeats):
        before, between, after = (timed(call, None)[0][WALL] for call in (floor, way, floor))
        ratios.append(between / statistics.mean((before, after)))
    pin(allowed, crew)
    return ratios


def pin(cores: set[int], crew: Workers) -> None:
    """Let all threads of this process and of its workers run on these cores alone."""
    workers = [worker._process.pid for worker in (crew._crew._running if crew._crew is not None else ())]
    for process in (os.getpid(), *workers):
        for thread in Path(f"/proc/{process}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)


def worker_mib(crew: Workers) -> int:
    """Return how much memory a worker has for itself; the pages of libraries that processes share are not counted."""
    kib = []
    for worker in crew._crew._running if crew._crew is not None else ():
        lines = Path(f"/proc/{worker._process.pid}/smaps_rollup").read_text().splitlines()
        kib.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
    return round(statistics.mean(kib) / 1024)


def figures(times: list[tuple[float, float]], number: int) -> dict[str, float]:
    """Return the medians for one picture."""
    wall, cpu = (statistics.median(column) / number for column in zip(*times, strict=True))
    return {
        "pictures_per_second": round(1 / wall, 1),
        "pictures_per_second_and_core": round(1 / cpu, 1),
        "cpu_ms_per_picture": round(1e3 * cpu, 2),
    }


def table(record: dict[str, Any]) -> list[list[str]]:
    """Return the figures as a table for people."""
    rows = [["way", "pictures/s", "pictures/s and core", "core ms/picture", "equal to stock"]]
    for name, part in record["ways"].items():
        same = {True: "yes", False: "NO"}.get(record["equal_to_stock"].get(name), "–")
        rows.append([name, *(f"{value}" for value in part.values()), same])
    rows += [[name, f"{ratio}", f"asked: {TARGETS.get(name, '–')}", "", ""] for name, ratio in record["ratios"].items()]
    return rows


if __name__ == "__main__":
    main()
