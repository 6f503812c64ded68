"""What the tasks are called in mteb, and what the encoder has to know about them.

mteb tells an encoder a task's metadata only. Two facts about tasks of MMEB's form are not in there, so they are found
by name: their texts are complete (the instruction is part of them, to the last newline), and the candidates of one of
them go in as queries do.
"""

from __future__ import annotations

from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb.datasets import MMEB, Benchmark, DatasetInfo

BENCHMARKS: dict[str, Benchmark] = {"MMEB": MMEB, "MMEB-mini": MMEB_MINI}
"""The benchmarks of MMEB's form, by their name in mteb."""


def task_name(benchmark: str, dataset: DatasetInfo) -> str:
    """Return the name of a dataset's task: `MMEB-ImageNet-1K`, `MMEB-mini-Scenes_t2i`."""
    return f"{benchmark}-{dataset.name}"


DATASETS: dict[str, DatasetInfo] = {
    task_name(name, dataset): dataset for name, benchmark in BENCHMARKS.items() for dataset in benchmark.datasets
}
"""Every dataset by the name of its task."""
