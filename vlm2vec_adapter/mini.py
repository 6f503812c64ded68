"""MMEB-mini on disk in the form that VLM2Vec reads, to try either generation without a download.

| in the folder                 |                                                                      |
|-------------------------------|----------------------------------------------------------------------|
| `MMEB-eval`                   | v1: `--dataset_name MMEB-eval --image_dir images`                    |
| `ziyjiang/MMEB_Test_Instruct` | V2: its code has this hub id, and a folder of that name is used first |
| `image.yaml`                  | V2: `--dataset_config image.yaml --data_basedir .`                   |
| `images`                      | the images of both                                                   |

Run VLM2Vec's script from inside the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.mini.benchmark import MMEB_MINI, WRITER, ensure
from gen2embed_mteb.mini.places import EVAL_TABLES, EVAL_TABLES_V2
from gen2embed_mteb.mmeb import DatasetInfo
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.owned_folder import OwnedFolder

V2_NAME = "ziyjiang/MMEB_Test_Instruct"
V2_PARSERS = {
    "label": "image_cls",
    "question": "image_qa",
    "text-to-image": "image_t2i",
    "dialogue-to-image": "image_t2i",
    "image-to-image": "image_i2i_vg",
}
"""V2's reader of a dataset, by its form."""


TABLES = (EVAL_TABLES, EVAL_TABLES_V2)


def write(folder: Path) -> None:
    """Draw MMEB-mini into a folder, unless it exists, and write the files that VLM2Vec's loaders need.

    Args:
        folder: The folder; it is created if missing.

    Raises:
        ForeignFileError: It holds files with the names of ours that we did not write; nothing was changed.
    """
    root, content = folder.expanduser(), _content(MMEB_MINI.datasets)
    new = [name for name, data in content.items() if not (root / name).is_file() or (root / name).read_bytes() != data]
    OwnedFolder(root, WRITER).check(new)
    _require_link(root)
    write_settings(ensure("eval", root), MMEB_MINI.datasets)


def write_settings(root: Path, datasets: Sequence[DatasetInfo]) -> None:
    """Write, beside tables and images, the files that VLM2Vec's loaders need.

    Args:
        root: The folder with V1 tables in `MMEB-eval`, V2 tables in `MMEB-eval-V2`, and `images`.
        datasets: The datasets of the tables.

    Raises:
        ForeignFileError: A file with the name of ours was not written by us.
    """
    folder = OwnedFolder(root, WRITER)
    for name, data in _content(datasets).items():
        folder.write(name, data)
    link = root / V2_NAME
    link.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(Path("..") / TABLES[1], target_is_directory=True)
    _require_link(root)


def _content(datasets: Sequence[DatasetInfo]) -> dict[str, bytes]:
    """Return the files beside the tables, by name."""
    card = _card([dataset.name for dataset in datasets]).encode()
    cards = {f"{tables}/README.md": card for tables in TABLES}
    return {**cards, "image.yaml": "".join(map(_task, datasets)).encode()}


def _require_link(root: Path) -> None:
    """Check that the link is ours, or that nothing is at its path."""
    link = root / V2_NAME
    if os.path.lexists(link) and (not link.is_symlink() or link.resolve() != (root / TABLES[1]).resolve()):
        raise ForeignFileError.of(link, f"is no link to {TABLES[1]}")


def _card(names: Sequence[str]) -> str:
    """Return the header by which the library `datasets` finds the subsets of a folder."""
    lines = ["---", "configs:"]
    for name in names:
        lines += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}/test-*.parquet"]
    return "\n".join([*lines, "---", "", "Written by vlm2vec_adapter.", ""])


def _task(dataset: DatasetInfo) -> str:
    settings = {
        "dataset_parser": V2_PARSERS[dataset.form],
        "dataset_name": dataset.name,
        "dataset_split": "test",
        "image_root": "images/",
        "eval_type": "local",
    }
    return f"{dataset.name}:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in settings.items())
