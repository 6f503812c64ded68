"""MMEB-mini on disk in the form that VLM2Vec reads: a trial of either generation without a download.

| in the folder                 |                                                                      |
|-------------------------------|----------------------------------------------------------------------|
| `MMEB-eval`                   | v1: `--dataset_name MMEB-eval --image_dir images`                    |
| `ziyjiang/MMEB_Test_Instruct` | V2: the name that its code has, which a folder in the way answers to |
| `image.yaml`                  | V2: `--dataset_config image.yaml --data_basedir .`                   |
| `images`                      | the images of both                                                   |

Run VLM2Vec's script from inside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure
from gen2embed_mteb.mmeb import DatasetInfo

V2_NAME = "ziyjiang/MMEB_Test_Instruct"
V2_PARSERS = {
    "label": "image_cls",
    "question": "image_qa",
    "text-to-image": "image_t2i",
    "dialogue-to-image": "image_t2i",
    "image-to-image": "image_i2i_vg",
}
"""V2's reader of a dataset, by its form."""


def write(folder: Path) -> None:
    """Draw MMEB-mini into a folder, unless it is there, and put beside it what VLM2Vec's loaders ask for.

    Args:
        folder: made if missing.
    """
    write_settings(ensure("eval", folder), MMEB_MINI.datasets)


def write_settings(root: Path, datasets: Sequence[DatasetInfo]) -> None:
    """Put beside tables and images what VLM2Vec's loaders ask for.

    Args:
        root: holds V1 tables in `MMEB-eval`, V2 tables in `MMEB-eval-V2`, and `images`.
        datasets: the tables' datasets.
    """
    for tables in (root / "MMEB-eval", root / "MMEB-eval-V2"):
        (tables / "README.md").write_text(_card([dataset.name for dataset in datasets]), encoding="utf-8")
    link = root / V2_NAME
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..") / "MMEB-eval-V2", target_is_directory=True)
    (root / "image.yaml").write_text("".join(map(_task, datasets)), encoding="utf-8")


def _card(names: Sequence[str]) -> str:
    """The header by which the library `datasets` finds the subsets of a folder."""
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
