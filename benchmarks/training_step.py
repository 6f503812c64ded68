"""Times a training step on a batch of text and image clusters: ours against the plain sentence-transformers recipe.

    python benchmarks/training_step.py --output benchmarks/results/training_step.json

The peer is what a user of sentence-transformers writes: its trainer's collator, on columns of `{"text", "image"}`, and
`CachedMultipleNegativesRankingLoss`, with sub-batches of the same size, the same model and adapter, images of the same
size, and the clusters in the order in which they were drawn. Ours is `SahaTrainer`'s collator and `SahaLoss`, with the
batch as `SahaBatchSampler` arranges it. A step is collation, loss and backward pass. Loss and gradients are compared:
they must be equal except for rounding.

The difference has four causes: rows are padded on the right and cut to the longest of their sub-batch; clusters of one
kind are side by side; the frozen vision tower is run once per step instead of twice; and, on a CPU, the beginning that
all rows of a sub-batch share is run for one of them only.

The floor is three passes over the language model (one without gradients, one with them, and the backward pass; frozen
weights need no gradient) and one over the vision tower, for all tokens that are not padding: two operations per weight
and token, at the speed of the model's largest product when it runs alone. Attention is not counted.

Memory is the peak of a step above what the process, its model and the batch needed before it. It is measured on
`gen2embed-mini`, at 1 to 16 times the sub-batch, each in a process of its own, with and without the image tokens that
are kept from the first pass for the second. The C library is told to return freed blocks to the system: by default it
keeps some, more of them the longer it runs, and the figure would include them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoding import SHAPES, common_words, machine, product_rate, write_base
from PIL import Image
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.demo.run import load_photos
from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.storage.developer_files import write_json
from trainers import SahaLoss
from trainers.batches.collation import CellReader

TARGET = 1.5
ROLES = {"query": "query", "positive": "document"}
FACTORS = (1, 2, 4, 8, 16)
KINDS = ("labels", "texts", "captions", "questions")
"""The kinds of clusters, in turn: image and label, text and text, caption and image, image with question and answer."""


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="65M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--num_clusters", type=int, default=8, help="of 8 pairs")
    parser.add_argument("--sub_batch_size", type=int, default=16)
    parser.add_argument("--image_side", type=int, default=448)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_factor", type=int, help=argparse.SUPPRESS)  # the process of one memory figure
    parser.add_argument("--no_reuse", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_factor:
        print(json.dumps(step_memory(arguments)))
        return
    if arguments.output is None:
        parser.error("--output is needed")
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(arguments, Path(scratch))
    record["memory"] = [memory_of(factor, arguments) for factor in FACTORS]
    print(as_text([["", "seconds"], *([name, f"{record[name]:.2f}"] for name in ("stock", "ours", "floor"))]))
    print(f"stock / ours = {record['ratio']}, ours / floor = {record['above_floor']}")
    print(f"largest difference of gradients: {record['difference']:.1e} of the largest entry")
    columns = ("pairs", "inputs_mib", "peak_mib", "peak_without_reuse_mib")
    print(as_text([list(columns), *([str(row[column]) for column in columns] for row in record["memory"])]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, record)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time steps of the peer and of ours, in turn."""
    rng = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    model = Gen2Embed(
        write_base(scratch / "base", arguments.shape), device=arguments.device, model_kwargs={"dtype": dtype}
    )
    add_adapter(model)
    clusters = draw_clusters(rng, common_words(), arguments.num_clusters, arguments.image_side)
    drawn = [pair for cluster in clusters for pair in cluster]
    arranged = [pair for kind in range(len(KINDS)) for cluster in clusters[kind :: len(KINDS)] for pair in cluster]
    size = arguments.sub_batch_size
    parts = {
        "stock": (
            BaseDataCollator(preprocess_fn=model.preprocess, router_mapping=ROLES),
            CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=size),
            drawn,
        ),
        "ours": (
            BaseDataCollator(preprocess_fn=CellReader(model, image_options=ImageOptions()), router_mapping=ROLES),
            SahaLoss(model, mini_batch_size=size),
            arranged,
        ),
    }
    for collator, loss, rows in parts.values():
        take_step(model, collator, loss, rows[:2])  # what runs for the first time is slower
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    found = {}
    for _ in range(arguments.repeats):
        for name, (collator, loss, rows) in parts.items():
            started = time.perf_counter()
            value = take_step(model, collator, loss, rows)
            seconds[name].append(time.perf_counter() - started)
            found[name] = (value, gradients(model))
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    largest = max(gradient.abs().max().item() for gradient in found["stock"][1])
    difference = max((a - b).abs().max().item() for a, b in zip(found["stock"][1], found["ours"][1], strict=True))
    floor = floor_flops(model, drawn) / product_rate(arguments)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    record = {
        "command": "python " + " ".join(sys.argv),
        "seed": arguments.seed,
        "versions": installed_versions(),
        "machine": machine(arguments.device),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "pairs": len(drawn),
        "sub_batch_size": arguments.sub_batch_size,
        **{name: round(value, 3) for name, value in middle.items()},
        "all_seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "ratio": round(middle["stock"] / middle["ours"], 2),
        "target": TARGET,
        "floor": round(floor, 3),
        "above_floor": round(middle["ours"] / floor, 2),
        "loss": [found["stock"][0], found["ours"][0]],
        "difference": difference / largest,
    }
    if torch.cuda.is_available() and arguments.device != "cpu":
        record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        record["samples_per_second"] = round(len(drawn) / middle["ours"], 1)
    return record


def add_adapter(model: Gen2Embed) -> None:
    """Add the recipe's adapter, without dropout, so that steps are equal.

    Its B is drawn, and not zero, so that all its parts get gradients.
    """
    new_adapter(model[0].model, family_of(model[0].config.model_type).lora_targets, dropout=0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.01)
    model.train()


def draw_clusters(
    rng: np.random.Generator, words: list[str], num_clusters: int, side: int
) -> list[list[dict[str, dict[str, Any]]]]:
    """Make clusters of eight pairs of one kind each, the kinds in turn; images are parts of two photographs."""
    photos = [photo.resize((side * 2, side * 2)) for photo in load_photos().values()]

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    def image() -> Image.Image:
        x, y = rng.integers(0, side, 2).tolist()
        return photos[int(rng.integers(len(photos)))].crop((x, y, x + side, y + side))

    makers: dict[str, Callable[[], tuple[dict[str, Any], dict[str, Any]]]] = {
        "labels": lambda: ({"text": "Identify the scene.", "image": image()}, {"text": text(2)}),
        "texts": lambda: ({"text": text(12)}, {"text": text(30)}),
        "captions": lambda: ({"text": text(12)}, {"image": image()}),
        "questions": lambda: ({"text": text(9), "image": image()}, {"text": text(1)}),
    }
    kinds = [KINDS[number % len(KINDS)] for number in range(num_clusters)]
    pairs = [[makers[kind]() for _ in range(8)] for kind in kinds]
    return [[{"query": query, "positive": positive} for query, positive in cluster] for cluster in pairs]


def take_step(model: Gen2Embed, collator: BaseDataCollator, loss: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
    """Make one step, leave its gradients in the model, and return the loss."""
    model.zero_grad()
    batch = collator(rows)
    features = []
    for column in ROLES:
        own = {name.removeprefix(f"{column}_"): value for name, value in batch.items() if name.startswith(column)}
        features.append(on_device(own, model))
    value = loss(features, None)
    value.backward()
    return float(value.detach())


def on_device(features: dict[str, Any], model: Gen2Embed) -> dict[str, Any]:
    """Return the features on the model's device."""
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in features.items()}


def gradients(model: Gen2Embed) -> list[torch.Tensor]:
    """Return copies of the adapter's gradients."""
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def floor_flops(model: Gen2Embed, rows: list[dict[str, Any]]) -> float:
    """Return the operations that every step needs; see the module's docstring."""
    inner = model[0].model
    language = sum(weight.numel() for weight in inner.language_model.layers.parameters())
    vision = sum(weight.numel() for weight in inner.visual.parameters())
    tokens = patches = 0
    for column, role in ROLES.items():
        for row in rows:
            features = model.preprocess([row[column]], task=role)
            tokens += int(features["attention_mask"].sum())
            patches += len(features.get("pixel_values", ()))
    return 2.0 * (3 * language * tokens + vision * patches)


def memory_of(factor: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the memory figures of a batch size, each from a process of its own."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    results = []
    for switch in ([], ["--no_reuse"]):
        command = [sys.executable, __file__, "--memory_factor", str(factor), "--device", arguments.device, *switch]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return {**results[0], "peak_without_reuse_mib": results[1]["peak_mib"]}


def step_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the peak memory of a step at `memory_factor` sub-batches, above model and batch."""
    model = Gen2Embed("gen2embed-mini", device=arguments.device)
    add_adapter(model)
    rng = np.random.default_rng(0)
    size = arguments.sub_batch_size
    # All sub-batches are alike and have images, so that the peak of one does not depend on their number.
    clusters = draw_clusters(rng, ["red", "blue", "circle", "square"], size * arguments.memory_factor // 8 * 4, 128)
    rows = [pair for cluster in clusters[2::4] for pair in cluster]
    reader = CellReader(model, image_options=ImageOptions())
    features = [on_device(reader([row[column] for row in rows], task=role), model) for column, role in ROLES.items()]
    loss = SahaLoss(model, mini_batch_size=size, reuse_image_features=not arguments.no_reuse)
    cuda = arguments.device != "cpu"
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
    loss(features, None).backward()
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    inputs = sum(value.nbytes for column in features for value in column.values() if torch.is_tensor(value))
    return {"pairs": len(rows), "inputs_mib": round(inputs / 2**20, 1), "peak_mib": round((peak - before) / 2**20, 1)}


def resident(field: str) -> int:
    """Return the bytes of memory that this process uses now (VmRSS), or used at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
