"""Loads a Phi-3.5-V of full size with random weights from the hub's two files, and encodes a text and a picture.

python benchmarks/phi3v_full_size.py --output benchmarks/results/phi3v_full_size.json

The published weights cannot be had everywhere; names, shapes and types of the tensors are those of the published files
(592 tensors, 4,146,621,440 parameters, bfloat16, 8.29 GB), and the numbers are drawn at random. What is shown is that a
folder of that layout loads, how much memory that takes, and how long an input takes.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.families.phi3v.configuration import Phi3VConfig
from gen2embed_mteb.embedder.families.phi3v.modeling import Phi3VModel
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.storage.developer_files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from tiny_phi3v import write_phi3v

NUM_TENSORS, NUM_PARAMETERS = 592, 4_146_621_440
FACTORS = [1.0 + index / 8 for index in range(48)]
FULL = {
    **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 32, "torch_dtype": "bfloat16", "vision_config": None},
    "rope_scaling": {"type": "su", "short_factor": FACTORS, "long_factor": [4 * factor for factor in FACTORS]},
}
PICTURE = (1770, 1180)


def main() -> None:
    """Write the folder, load it, encode, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--work_dir", type=Path, default=Path("build/phi3v_full_size"), help="8.3 GB are written")
    parser.add_argument("--num_crops", type=int, default=4)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    seconds: dict[str, float] = {}
    with _timed(seconds, "write"):
        shapes = _write(arguments.work_dir / "model")
    with _timed(seconds, "load"):
        model = Gen2Embed(
            arguments.work_dir / "model", device="cpu", processor_kwargs={"num_crops": arguments.num_crops}
        )
    with _timed(seconds, "text"):
        text = model.encode_document(["a tabby cat on a sofa"])
    picture = Image.effect_noise(PICTURE, 60).convert("RGB")
    with _timed(seconds, "picture"):
        image = model.encode_document([picture])
    features = model.preprocess([picture], task="document")
    found = {
        "tensors": len(shapes),
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "dtype": str(model[0].model.dtype),
        "dimensions": text.shape[1],
        "picture": {"size": PICTURE, "crops": arguments.num_crops, "tokens": features["input_ids"].shape[1]},
        "norms": [round(float(np.linalg.norm(rows)), 6) for rows in (text, image)],
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "command": " ".join(["python", "benchmarks/phi3v_full_size.py", *sys.argv[1:]]),
    }
    if (found["tensors"], found["parameters"]) != (NUM_TENSORS, NUM_PARAMETERS):
        sys.exit(f"error: the folder is not of the published size: {found['tensors']}, {found['parameters']}")
    if not np.allclose(found["norms"], 1, atol=1e-3):
        sys.exit(f"error: the norms are {found['norms']}")
    print(json.dumps(found, indent=1))
    if arguments.output:
        write_json(arguments.output, found)


def _write(folder: Path) -> dict[str, tuple[int, ...]]:
    """Write the folder, if it is not there yet; return the shapes of all tensors by the published names."""
    with torch.device("meta"):
        described = Phi3VModel(Phi3VConfig(**{name: value for name, value in FULL.items() if name != "torch_dtype"}))
    shapes = {_published(name): tuple(value.shape) for name, value in described.state_dict().items()}
    shapes["lm_head.weight"] = (32064, 3072)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return shapes
    write_phi3v(folder, **FULL)
    (folder / "model.safetensors").unlink()  # the small weights that were written with the other files
    draw = torch.Generator().manual_seed(0)
    names, half = list(shapes), 4.94e9
    parts: list[list[str]] = [[], []]
    size = 0
    for name in names:
        size += 2 * int(np.prod(shapes[name]))
        parts[int(size > half)].append(name)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        tensors = {name: _drawn(name, shapes[name], draw) for name in part}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        del tensors
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


def _published(name: str) -> str:
    return f"model.{name.removeprefix('language_model.')}"


def _drawn(name: str, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Return random weights; norms are near 1."""
    values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)
    return values + 1 if name.endswith("norm.weight") else values


@contextmanager
def _timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


if __name__ == "__main__":
    main()
