"""The names of the tasks in mteb, by which the encoder finds the datasets.

mteb passes only a task's metadata to an encoder. Two facts about tasks of MMEB's form are not in the metadata, so they
are found by name: their texts are complete (the instruction is part of them, up to the last newline), and the
candidates of one task are encoded as queries.
"""

from __future__ import annotations

from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb.datasets import MMEB, Benchmark, DatasetInfo

BENCHMARKS: dict[str, Benchmark] = {"MMEB": MMEB, "MMEB-mini": MMEB_MINI}
"""The benchmarks of MMEB's form, by their name in mteb."""


def task_name(benchmark: str, dataset: DatasetInfo) -> str:
    """Return the name of a dataset's task, such as `MMEB-ImageNet-1K` or `MMEB-mini-Scenes_t2i`."""
    return f"{benchmark}-{dataset.name}"


DATASETS: dict[str, DatasetInfo] = {
    task_name(name, dataset): dataset for name, benchmark in BENCHMARKS.items() for dataset in benchmark.datasets
}
"""Every dataset by the name of its task."""
