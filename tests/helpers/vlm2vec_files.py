"""Small data in MMEB's form as VLM2Vec reads it, both generations, with what MMEB is known to hold of oddities.

`write_data` fills a folder as `python -m vlm2vec_adapter mini` does: V1 tables in `MMEB-eval`, V2 tables under the name
that V2's code has, `image.yaml`, and images. `runner` runs a script there.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mmeb_files import M, write_table
from PIL import Image

from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.row_text import compose_candidates, compose_query
from vlm2vec_adapter.mini import write_settings

NUM_ROWS, NUM_CANDIDATES = 9, 5
SUBSETS = ("VOC2007", "OK-VQA", "WebQA", "NIGHTS", "RefCOCO-Matching")
MODES = ("RGB", "L", "RGBA", "P", "RGB")
SIZES = ((90, 60), (40, 100), (64, 64), (150, 12), (28, 56), (9, 9))  # the fourth and the last below a patch of 28
STANDINS = Path(__file__).parents[1] / "interop"


def write_data(root: Path) -> Path:
    """Five datasets, one of each form and RefCOCO-Matching."""
    random = np.random.default_rng(3)
    (root / "images").mkdir(parents=True)
    paths = [f"{number}.png" for number in range(NUM_ROWS)]
    for number, path in enumerate(paths):
        width, height = SIZES[number % len(SIZES)]
        pixels = random.integers(0, 255, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        image.convert(MODES[number % len(MODES)]).save(root / "images" / path)
    words = ["circle", "square", "cross", "star", "ring", "moon", "red", "green", "blue"]
    for name in SUBSETS:
        rows = [_row(name, number, random, words, paths) for number in range(NUM_ROWS)]
        _write(root, name, rows)
    write_settings(root, MMEB.select(SUBSETS).datasets)
    return root


def _row(name: str, number: int, random: np.random.Generator, words: list[str], paths: list[str]) -> dict[str, Any]:
    """One row in V2's columns; the positive comes first."""
    others = [place for place in random.permutation(NUM_ROWS).tolist() if place != number]
    chosen = [number, *others[: NUM_CANDIDATES - 1]]
    word, path = words[number], paths[number]
    labels = {"tgt_inst": "", "tgt_text": [words[place] for place in chosen], "tgt_img_path": [""] * NUM_CANDIDATES}
    pictures = {"tgt_inst": f"{M}\nRepresent the given image.", "tgt_img_path": [paths[place] for place in chosen]}
    if name == "VOC2007":
        return {"qry_inst": f"{M}\nName the object:", "qry_text": "", "qry_img_path": path, **labels}
    if name == "OK-VQA":
        # One question is longer than --max_len lets through.
        question = "what is it" if number else " ".join(words * 60)
        return {"qry_inst": f"{M}\nAnswer: ", "qry_text": question, "qry_img_path": path, **labels}
    if name == "WebQA":
        # A marker, and no image.
        captions = [f"A {words[place]}." for place in chosen]
        query = {"qry_inst": f"{M}\nFind an image that answers:", "qry_text": f"where is a {word}", "qry_img_path": ""}
        return {**query, **pictures, "tgt_inst": f"{M}\nRepresent with caption:", "tgt_text": captions}
    if name == "NIGHTS":
        query = {"qry_inst": f"{M}\nFind one that looks alike.", "qry_text": "", "qry_img_path": path}
        return {**query, **pictures, "tgt_text": [""] * NUM_CANDIDATES}
    select = f"{M}\nSelect the portion that follows the description."
    texts = [f'"the {words[place]}"' for place in chosen]
    query = {"qry_inst": select, "qry_text": f'"the {word}"', "qry_img_path": path}
    return {**query, **pictures, "tgt_inst": select, "tgt_text": texts}


def _write(root: Path, name: str, rows: list[dict[str, Any]]) -> None:
    form = MMEB.select([name]).datasets[0].form
    v1 = [
        {
            "qry_text": compose_query(form, row["qry_inst"], row["qry_text"]),
            "qry_img_path": row["qry_img_path"],
            "tgt_text": compose_candidates(form, row["tgt_inst"], row["tgt_text"]),
            "tgt_img_path": row["tgt_img_path"],
        }
        for row in rows
    ]
    for tables, content in (("MMEB-eval", v1), ("MMEB-eval-V2", rows)):
        write_table(root / tables / name / "test-00000-of-00001.parquet", content)


def flags(generation: str, output: Path | str, subsets: tuple[str, ...] = SUBSETS) -> list[str]:
    """VLM2Vec's own flags for a run on this data, from inside its folder."""
    data = ["--dataset_config", "image.yaml", "--data_basedir", "."]
    if generation == "v1":
        data = ["--dataset_name", "MMEB-eval", "--dataset_split", "test", "--image_dir", "images"]
        data += ["--subset_name", *subsets]
    return [*data, "--encode_output_path", str(output), "--per_device_eval_batch_size", "7"]


def run(
    command: list[str], data: Path, *, check: bool = True, python: str = sys.executable, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in the data's folder, offline, on one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GEN2EMBED_", "PYTHONHASH"))}
    # Tables of one name differ from test to test: each folder keeps its own copies.
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(data / "cache")}
    result = subprocess.run(
        [python, *command], cwd=data, env={**kept, **settings, **variables}, text=True, capture_output=True, check=False
    )
    assert not check or result.returncode == 0, result.stderr
    return result
