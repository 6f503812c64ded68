"""The benchmarks `MMEB` and `MMEB-mini`, with the averages of the paper's tables.

`benchmark.get_score(results)` returns, per model, `Mean(Task)` (the paper's Overall), `Meta-task::Classification` and
the other meta-tasks, `Domain::IND` and `Domain::OOD`; mteb's leaderboard shows them as columns. Each dataset has the
same weight.
"""

from __future__ import annotations

from importlib import import_module

from mteb.benchmarks.benchmark import Benchmark, BenchmarkAggregation, CustomGroup, CustomGrouping

from gen2embed_mteb.mteb_plugin.names import BENCHMARKS
from gen2embed_mteb.mteb_plugin.tasks.mmeb_tasks import TASKS, AbsTaskMMEB
from gen2embed_mteb.mteb_plugin.tasks.task_metadata import MMEB_CITATION

_DESCRIPTIONS = {
    "MMEB": "The Massive Multimodal Embedding Benchmark, image part: 36 datasets in four meta-tasks; every query ranks "
    "its own candidates, scored by Precision@1. 20 datasets are in the domain of MMEB-train, 16 are out of it.",
    "MMEB-mini": "A small benchmark in MMEB's form, drawn on the machine without a download: 16 datasets of coloured "
    "shapes and scanned digits. For trying models and code, not for ranking models.",
}


def install() -> None:
    """Let mteb find both benchmarks by name; calling it twice changes nothing.

    Raises:
        ImportError, AttributeError: This version of mteb keeps its benchmarks elsewhere.
    """
    found = import_module("mteb.benchmarks.benchmarks")
    for name in BENCHMARKS:
        attribute = name.replace("-", "_")
        if not hasattr(found, attribute):
            setattr(found, attribute, benchmark(name))
    lookup = import_module("mteb.benchmarks.get_benchmark")
    lookup._build_registry.cache_clear()
    lookup._build_aliases_registry.cache_clear()


def benchmark(name: str) -> Benchmark:
    """Build a benchmark of mteb.

    Args:
        name: `MMEB` or `MMEB-mini`.
    """
    tasks = [task() for task in TASKS[name]]

    def group(label: str, members: list[AbsTaskMMEB]) -> CustomGroup:
        return CustomGroup(label=label, tasks=members)

    meta_tasks = tuple(
        group(meta_task, [task for task in tasks if task.info.meta_task == meta_task])
        for meta_task in BENCHMARKS[name].meta_tasks
    )
    domains = (
        group("IND", [task for task in tasks if task.info.in_domain]),
        group("OOD", [task for task in tasks if not task.info.in_domain]),
    )
    official = name == "MMEB"
    return Benchmark(
        name=name,
        tasks=tasks,
        description=_DESCRIPTIONS[name],
        reference="https://arxiv.org/abs/2410.05160" if official else None,
        citation=MMEB_CITATION if official else None,
        aggregations=(
            BenchmarkAggregation.MEAN_TASK,
            CustomGrouping(name="Meta-task", groups=meta_tasks),
            CustomGrouping(name="Domain", groups=domains),
        ),
    )
