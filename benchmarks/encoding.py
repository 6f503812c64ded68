"""Compares bulk encoding with stock `SentenceTransformer.encode`: same exported directory, machine, run and vectors.

    python benchmarks/encoding.py --output benchmarks/results/encoding.json

The model is a random Qwen2-VL of 60-70 million parameters with a BPE of 16,000 tokens (learned from scikit-learn's own
text, so that a common word is one token, as in Qwen's). The mix is MMEB's: short labels, captions, images with a text.
Labels and captions are timed without repetitions; labels with MMEB-like repetitions are timed separately.

The floor is the time for the work that every exact encoder must do: two operations per weight for every token that is
not in the shared beginning, at the speed that the model's largest product reaches on this machine when it runs alone.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.demo.run import load_photos
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mini.pretrain import SPECIAL_TOKENS, build_tokenizer
from gen2embed_mteb.storage.developer_files import write_json

TARGETS = {"labels": 2.5, "captions": 2.5, "images + text": 1.3}
SHAPES = {
    # name: text hidden, layers, intermediate, heads, kv heads, vision size, vision depth
    "65M": (512, 12, 1536, 8, 2, 384, 12),
    "2B": (1536, 28, 8960, 12, 2, 1280, 32),
}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="65M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--num_texts", type=int, default=320, help="labels, and as many captions")
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--batch_tokens", type=int, help="default: as for evaluate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(arguments, Path(scratch))
    print(as_text(table(record)))
    write_json(arguments.output, record)


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time every part of the mix on both encoders, one after the other, and compare their vectors."""
    rng = np.random.default_rng(arguments.seed)
    torch.manual_seed(arguments.seed)
    words = common_words()
    options: dict[str, Any] = {"device": arguments.device, "model_kwargs": {"dtype": getattr(torch, arguments.dtype)}}
    model = Gen2Embed(write_base(scratch / "base", arguments.shape), **options)
    model.save_pretrained(str(scratch / "exported"))
    stock = SentenceTransformer(str(scratch / "exported"), **options)
    model = Gen2Embed(scratch / "exported", **options)
    parts = mix(rng, words, arguments, scratch / "images")
    rate = product_rate(arguments)
    record: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "seed": arguments.seed,
        "versions": installed_versions(),
        "machine": machine(arguments.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "product_gflops": round(rate / 1e9, 1),
        "parts": {},
    }
    for name, items in parts.items():
        side = "query" if name == "images + text" else "document"
        peer, ours = [], []
        for repeat in range(arguments.repeats + 1):
            seconds, expected = timed(lambda items=items, side=side: encode_stock(stock, side, items, scratch))
            store = EmbeddingStore(scratch / f"{name}-{repeat}", {})
            bulk = BulkEncoder(PrefixEncoder(model), store, ImageSource(scratch), batch_tokens=arguments.batch_tokens)

            def encode_bulk(bulk: BulkEncoder = bulk, side: Any = side, items: list[Item] = items) -> np.ndarray:
                bulk.add(side, items)
                return bulk.vectors(side, items)

            our_seconds, vectors = timed(encode_bulk)
            if repeat:  # the first round is not counted, as what runs for the first time is slower
                peer.append(seconds)
                ours.append(our_seconds)
        tokens, shared = count_tokens(model, side, items, scratch)
        flops = floor_flops(model, items, tokens - shared, scratch)
        record["parts"][name] = {
            "inputs": len(items),
            "distinct": len(set(items)),
            "stock_seconds": round(statistics.median(peer), 3),
            "bulk_seconds": round(statistics.median(ours), 3),
            "ratio": round(statistics.median(peer) / statistics.median(ours), 2),
            "target": TARGETS.get(name),
            "largest_difference": float(np.abs(vectors - expected).max()),
            "tokens": tokens,
            "tokens_not_shared": tokens - shared,
            "floor_gflop": round(flops / 1e9, 1),
            "floor_seconds": round(flops / rate, 3),
            "above_floor": round(statistics.median(ours) / (flops / rate), 2),
        }
        print(f"{name}: {record['parts'][name]}", flush=True)
    return record


def encode_stock(stock: SentenceTransformer, side: str, items: list[Item], root: Path) -> np.ndarray:
    """Encode as a user of sentence-transformers does, with its default batch size."""
    inputs = [
        {"text": item.text, "image": Image.open(root / item.images[0]).convert("RGB")} if item.images else item.text
        for item in items
    ]
    return getattr(stock, f"encode_{side}")(inputs, show_progress_bar=False)


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def mix(
    rng: np.random.Generator, words: list[str], arguments: argparse.Namespace, images: Path
) -> dict[str, list[Item]]:
    """Make the parts: labels of 1-3 words, captions of 8-16, photographs of 224-560 pixels a side with a question."""

    def phrases(count: int, least: int, most: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found[" ".join(rng.choice(words, size=int(rng.integers(least, most + 1))))] = None
        return list(found)

    labels, captions = phrases(arguments.num_texts, 1, 3), phrases(arguments.num_texts, 8, 16)
    # Labels are drawn as in MMEB, where a few labels are in most rows.
    weights = 1 / np.arange(1, len(labels) + 1)
    drawn = rng.choice(labels, size=4 * len(labels), p=weights / weights.sum())
    parts = {
        "labels": [Item(text) for text in labels],
        "captions": [Item(text + ".\n") for text in captions],
        "labels, repeated": [Item(str(text)) for text in drawn],
    }
    images.mkdir()
    photos = list(load_photos().values())
    queries = []
    for number in range(arguments.num_images):
        photo = photos[number % len(photos)]
        width, height = (int(side) for side in rng.integers(224, 561, size=2))
        left, top = int(rng.integers(0, 80)), int(rng.integers(0, 80))
        photo.crop((left, top, photo.width, photo.height)).resize((width, height)).save(images / f"{number}.jpg")
        text = "<|image_1|>\nRepresent the given image with the following question: " + " ".join(rng.choice(words, 8))
        queries.append(Item(f"{text}?\n", (f"images/{number}.jpg",)))
    return parts | {"images + text": queries}


def common_words() -> list[str]:
    """Return the 3,000 most common words of scikit-learn's sources, which are always installed and change little."""
    counts = Counter(word for text in corpus() for word in re.findall(r"\b[a-z]{3,12}\b", text))
    return [word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:3000]]


def corpus() -> Iterator[str]:
    """Yield English-like text: scikit-learn's own Python files, in order."""
    import sklearn

    for path in sorted(Path(sklearn.__file__).parent.rglob("*.py"))[:400]:
        yield path.read_text(encoding="utf-8")


def write_base(directory: Path, shape: str) -> Path:
    """Write a random Qwen2-VL in the layout of the Hub, and return its directory."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    hidden, layers, intermediate, heads, kv_heads, vision, depth = SHAPES[shape]
    tokenizer = build_tokenizer(corpus(), 16_000)
    tokenizer.model_max_length = 4096
    token = tokenizer.convert_tokens_to_ids
    section = hidden // heads // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [section // 4, 3 * section // 8, 3 * section // 8],
            },
            "tie_word_embeddings": True,
            "bos_token_id": token(SPECIAL_TOKENS[0]),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "embed_dim": vision,
            "hidden_size": hidden,
            "depth": depth,
            "num_heads": 16 if vision > 1000 else 6,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    settings = Qwen2VLImageProcessorPil().to_dict()
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    write_json(directory / "preprocessor_config.json", settings)
    return directory


def product_rate(arguments: argparse.Namespace) -> float:
    """Return the operations per second of the model's largest product alone: 2,048 tokens by the up-projection."""
    hidden, _, intermediate, *_ = SHAPES[arguments.shape]
    dtype = getattr(torch, arguments.dtype)
    one = torch.randn(2048, hidden, device=arguments.device, dtype=dtype)
    other = torch.randn(hidden, intermediate, device=arguments.device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        (one @ other).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * hidden * intermediate / best


def count_tokens(model: Gen2Embed, side: Any, items: list[Item], root: Path) -> tuple[int, int]:
    """Return how many tokens the distinct inputs have, and how many of them are in the shared beginning."""
    encoder = PrefixEncoder(model)
    tokens = shared = 0
    for item in dict.fromkeys(items):
        entry: dict[str, Any] = {"text": item.text}
        if item.images:
            entry["image"] = Image.open(root / item.images[0])
        prepared = encoder.prepare(side, [entry])
        tokens += prepared.num_shared + prepared.input_ids.shape[1]
        shared += prepared.num_shared
    return tokens, shared


def floor_flops(model: Gen2Embed, items: list[Item], tokens: int, root: Path) -> float:
    """Return two operations per weight: decoder layers for tokens not shared, the vision tower for patches.

    Attention is not counted.
    """
    decoder = sum(parameter.numel() for parameter in model[0].model.language_model.layers.parameters())
    vision = sum(parameter.numel() for parameter in model[0].model.visual.blocks.parameters())
    patches = sum(
        int(model.processor.image_processor(images=[Image.open(root / item.images[0])])["image_grid_thw"].prod())
        for item in dict.fromkeys(items)
        if item.images
    )
    return 2.0 * (decoder * tokens + vision * patches)


def machine(device: str) -> dict[str, Any]:
    """Return what the figures were made on."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {"cpu": names[0] if names else "unknown", "threads": torch.get_num_threads()}


def table(record: dict[str, Any]) -> list[list[str]]:
    """Return the figures as a table for people."""
    rows = [["part", "inputs", "stock s", "bulk s", "ratio", "target", "x floor", "tokens", "not shared", "difference"]]
    for name, part in record["parts"].items():
        rows.append(
            [
                name,
                str(part["inputs"]),
                f"{part['stock_seconds']:.2f}",
                f"{part['bulk_seconds']:.2f}",
                f"{part['ratio']:.2f}",
                "–" if part["target"] is None else f"{part['target']}",
                f"{part['above_floor']:.2f}",
                str(part["tokens"]),
                str(part["tokens_not_shared"]),
                f"{part['largest_difference']:.0e}",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
