"""MMEB-mini on disk, in MMEB's own form: it is drawn on first use, and the same seed gives the same bytes.

    <root>/MMEB-eval/<dataset>/test-00000-of-00001.parquet        V1 columns
    <root>/MMEB-eval-V2/<dataset>/test-00000-of-00001.parquet     V2 columns, the same rows
    <root>/images/<dataset>/…png                                  the images of both
    <root>/MMEB-train/<dataset>/{original,diverse_instruction}-00000-of-00001.parquet, and its images/
    <root>/truth/<dataset>.json                                   the meaning of each training positive, row by row
    <root>/SugarCrepe/*.json, <root>/SugarCrepe++/*.json          and their images in val2017/
    <root>/diverse/{flickr30k_test,Urban1k}/                      images with captions, for retrieval both ways

A part is drawn into a temporary folder and moved when it is complete. It is valid once `<root>/<part>.json` exists, so
an interrupted run leaves no valid part. If several processes need a part at the same time, one draws it and the others
wait. A folder that holds foreign files with the names of ours is refused (see `storage/owned_folder.py`).
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock
from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini.digits import test_digits, train_digits
from gen2embed_mteb.mini.places import (
    CREPE_IMAGES,
    DIVERSE,
    EVAL_IMAGES,
    EVAL_TABLES,
    EVAL_TABLES_V2,
    SUGARCREPE,
    SUGARCREPE_PLUS,
    TRAIN_TABLES,
    TRUTH,
)
from gen2embed_mteb.mini.tasks import MiniTask, Pair, Target, tasks
from gen2embed_mteb.mmeb.datasets import Benchmark
from gen2embed_mteb.mmeb.row_text import compose_candidates, compose_query
from gen2embed_mteb.storage.atomic import ForeignFileError, remove_stale, write_atomic
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.storage.paths import user_cache

Part = Literal["eval", "train", "crepe", "diverse"]
SEED = 7
NUM_QUERIES = 300
WRITER = "mini"
"""The name of the writer in the ledger of the root."""
LOCK = ".mmeb-mini.lock"
VERSION = "2"
"""Changes whenever other data is drawn, so that a cache of an older version is not used for this one."""

MMEB_MINI = Benchmark("mmeb-mini", "MMEB-mini", tuple(task.info for task in tasks(test_digits)))


def default_root() -> Path:
    """Return the default folder of MMEB-mini, in the user's cache folder."""
    return user_cache() / f"mmeb-mini-{VERSION}"


def ensure(part: Part, root: str | Path | None = None, seed: int = SEED) -> Path:
    """Draw a part of MMEB-mini unless it exists, and return its root; other processes wait and then find it.

    Args:
        part: `eval` (V1 and V2), `train`, `crepe` (SugarCrepe-mini and SugarCrepe++-mini), or `diverse`.
        root: The folder; `None` or an empty text stands for `default_root()`.
        seed: The seed of everything that is drawn. Another seed needs another root.

    Raises:
        ForeignFileError: The root holds files with the names of ours that we did not write; nothing was changed.
        Gen2EmbedError: The root holds a part of another seed or version, or an incomplete part.
    """
    base = Path(root).expanduser() if root else default_root()
    if _is_drawn(base, part, seed):
        return base
    _require_ours(base, part)  # before anything is created in a folder of the user
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / LOCK):
        if _is_drawn(base, part, seed):
            return base
        _require_ours(base, part)
        remove_stale(base)
        folder = OwnedFolder(base, WRITER)
        with folder.scratch() as scratch:
            _WRITERS[part](scratch, seed)
            folder.adopt(scratch)
        folder.write_json(f"{part}.json", {"version": VERSION, "seed": seed})
    return base


PLACES: dict[Part, tuple[str, ...]] = {
    "eval": (EVAL_TABLES, EVAL_TABLES_V2, EVAL_IMAGES),
    "train": (TRAIN_TABLES, TRUTH),
    "crepe": (SUGARCREPE, SUGARCREPE_PLUS, CREPE_IMAGES),
    "diverse": (DIVERSE,),
}
"""The folders of each part, below the root."""


def _is_drawn(base: Path, part: Part, seed: int) -> bool:
    """Return whether a part exists.

    Raises:
        Gen2EmbedError: The part has another seed or version, or is incomplete.
    """
    marker, stamp = base / f"{part}.json", {"version": VERSION, "seed": seed}
    if not marker.is_file():
        return False
    try:
        found = json.loads(marker.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Gen2EmbedError(f"{marker} is none of MMEB-mini's ({error}): choose another folder") from error
    if found != stamp:
        raise Gen2EmbedError(f"{marker} says {found}, wanted {stamp}: choose another folder, or move this one away")
    folder = OwnedFolder(base, WRITER)
    # If an image is missing, its row is set aside; but a missing or edited table would silently be another benchmark.
    # A root of an earlier version has no ledger to compare with.
    tables = [name for name in folder.known() if name.startswith(_inside(part)) and not name.endswith(".png")]
    damaged = [place for place in PLACES[part] if not (base / place).is_dir()] + folder.changed(tables)
    if damaged:
        fault = "was changed since it was drawn" if (base / damaged[0]).exists() else "is missing"
        raise Gen2EmbedError(
            f"{base} is no whole MMEB-mini: {damaged[0]} {fault}. Move the folder away; it is drawn again"
        )
    return True


def _require_ours(base: Path, part: Part) -> None:
    folder = OwnedFolder(base, WRITER)
    try:
        for place in PLACES[part]:
            folder.check_tree(place)
        folder.check([f"{part}.json"])
    except ForeignFileError as error:
        raise ForeignFileError(f"MMEB-mini is not drawn into {base}: {error}") from error


def _inside(part: Part) -> tuple[str, ...]:
    return tuple(f"{place}/" for place in PLACES[part])


class ImageFolder:
    """Writes images under numbered names, each distinct image object once."""

    def __init__(self, root: Path, prefix: str) -> None:
        """Create the folder `prefix` in `root`; paths in the tables begin with `prefix`."""
        self._root, self._prefix = root, prefix
        self._paths: dict[int, tuple[np.ndarray, str]] = {}
        (root / prefix).mkdir(parents=True, exist_ok=True)

    def path(self, pixels: np.ndarray | None) -> str:
        """Return the path of an image relative to the root, "" for no image; the file is written on first use."""
        if pixels is None:
            return ""
        if id(pixels) not in self._paths:
            name = f"{self._prefix}/{len(self._paths):05d}.png"
            Image.fromarray(pixels).save(self._root / name, compress_level=1)
            self._paths[id(pixels)] = (pixels, name)  # the array is kept, so that no other array gets its id
        return self._paths[id(pixels)][1]


def _rng(seed: int, name: str, part: str) -> np.random.Generator:
    """Return a separate random stream for each dataset and part, so that one can change without the others."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), zlib.crc32(part.encode())))


def _write_eval(root: Path, seed: int) -> None:
    for task in _with_progress(tasks(test_digits), "MMEB-mini"):
        rng = _rng(seed, task.info.name, "eval")
        pairs = task.make(rng, NUM_QUERIES)
        images = ImageFolder(root / EVAL_IMAGES, task.info.name)
        v1: list[dict[str, Any]] = []
        v2: list[dict[str, Any]] = []
        for pair in pairs:
            candidates = _candidates(rng, task, pair, pairs)
            texts = [candidate.text for candidate in candidates]
            paths = [images.path(candidate.pixels) for candidate in candidates]
            instruction = task.query_instructions[0]
            shared = {"qry_img_path": images.path(pair.pixels), "tgt_img_path": paths}
            v1.append(
                {
                    "qry_text": compose_query(task.info.form, instruction, pair.text),
                    "tgt_text": compose_candidates(task.info.form, task.target_instruction, texts),
                    **shared,
                }
            )
            v2.append(
                {
                    "qry_inst": instruction,
                    "qry_text": pair.text,
                    "tgt_inst": task.target_instruction,
                    "tgt_text": texts,
                    **shared,
                }
            )
        _write_table(root / EVAL_TABLES / task.info.name / _table_name("test"), v1)
        _write_table(root / EVAL_TABLES_V2 / task.info.name / _table_name("test"), v2)


def _candidates(rng: np.random.Generator, task: MiniTask, pair: Pair, pairs: list[Pair]) -> list[Target]:
    """Return the positive, the hard candidates, and then, in random order, candidates of other truths."""
    chosen = [pair.positive, *pair.hard]
    taken = {target.truth for target in chosen}
    pool = [Target(label, None, label) for label in task.labels] or [other.positive for other in pairs]
    for index in rng.permutation(len(pool)):
        if len(chosen) == task.num_candidates:
            break
        if pool[index].truth not in taken:
            chosen.append(pool[index])
            taken.add(pool[index].truth)
    return chosen


def _write_train(root: Path, seed: int) -> None:
    for task in _with_progress([task for task in tasks(train_digits) if task.num_train], "MMEB-mini training"):
        name, form = task.info.name, task.info.form
        rng = _rng(seed, name, "train")
        pairs = (task.make_train or task.make)(rng, task.num_train)
        images = ImageFolder(root / TRAIN_TABLES, f"images/{name}/Train")
        for split, instructions in (("original", task.query_instructions[:1]), ("diverse_instruction", None)):
            rows = []
            for pair in pairs:
                chosen = instructions or task.query_instructions
                instruction = chosen[int(rng.integers(len(chosen)))]
                negative = pair.hard[0] if pair.hard else Target("", None, "")
                positive_text, negative_text = compose_candidates(
                    form, task.target_instruction, [pair.positive.text, negative.text]
                )
                rows.append(
                    {
                        "qry": compose_query(form, instruction, pair.text),
                        "qry_image_path": images.path(pair.pixels),
                        "pos_text": positive_text,
                        "pos_image_path": images.path(pair.positive.pixels),
                        "neg_text": negative_text if pair.hard else "",
                        "neg_image_path": images.path(negative.pixels),
                    }
                )
            _write_table(root / TRAIN_TABLES / name / _table_name(split), rows)
        truth = root / TRUTH / f"{name}.json"
        truth.parent.mkdir(exist_ok=True)
        write_atomic(truth, (json.dumps([pair.positive.truth for pair in pairs], indent=0) + "\n").encode())


def _write_crepe(root: Path, seed: int) -> None:
    from gen2embed_mteb.mini.crepe import write_crepe

    write_crepe(root, _rng(seed, "crepe", "eval"))


def _write_diverse(root: Path, seed: int) -> None:
    from gen2embed_mteb.mini.diverse import write_diverse

    write_diverse(root, _rng(seed, "diverse", "eval"))


_WRITERS: dict[Part, Callable[[Path, int], None]] = {
    "eval": _write_eval,
    "train": _write_train,
    "crepe": _write_crepe,
    "diverse": _write_diverse,
}


def _table_name(split: str) -> str:
    return f"{split}-00000-of-00001.parquet"


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _with_progress(items: Any, label: str) -> Any:
    from tqdm import tqdm

    return tqdm(items, desc=f"drawing {label}", unit="dataset", disable=not sys.stderr.isatty())
