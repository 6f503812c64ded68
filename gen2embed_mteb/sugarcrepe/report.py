"""The reports of a run on SugarCrepe or SugarCrepe++: `results.json`, and a table with the paper's figures."""

from __future__ import annotations

from typing import Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.method import described, method_of
from gen2embed_mteb.evaluation.paper import SUGARCREPE, SUGARCREPE_PLUS
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.run_folder import run_settings
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.sugarcrepe.groups import GROUPS, of_groups, published_groups
from gen2embed_mteb.sugarcrepe.scoring import CompositionalityResult


def results_json(result: CompositionalityResult, config: EvaluationConfig) -> dict[str, Any]:
    """Build the content of `results.json`, in a form similar to MMEB's.

    Args:
        result: The run's outcome.
        config: Its settings.

    Returns:
        `accuracy_itt` (and `accuracy_tot`) in [0, 1], per set and overall, by the official rule, which counts ties as
        wrong; `…_ties_right` counts ties as right.
    """
    tasks = result.benchmark.tasks
    return {
        "model": config.model_name,
        "revision": config.revision,
        "prompt_mode": config.prompt_mode,
        **({} if config.readout == "last" else {"readout": config.readout}),
        "benchmark": result.benchmark.name,
        "method": method_of(config).to_json(),
        "settings": run_settings(config),
        "datasets": sets_json(result),
        "overall": {f"accuracy_{task}": result.overall(task) for task in tasks},
        **({"groups": groups_of(result)} if config.plain_captions and len(tasks) == 1 else {}),
        "fingerprint": config.fingerprint,
        "versions": installed_versions(),
        "seconds": round(result.seconds, 3),
    }


def sets_json(result: CompositionalityResult) -> dict[str, dict[str, float | int | None]]:
    """Return the figures of every set, for `results.json`."""
    tasks = result.benchmark.tasks
    return {
        score.name: {
            **{f"accuracy_{task}": score.accuracy(task) for task in tasks},
            **{f"accuracy_{task}_ties_right": score.accuracy(task, ties_count=True) for task in tasks},
            "num_queries": score.num_scored,
            "num_errors": score.num_errors,
        }
        for score in result.scores
    }


def markdown(result: CompositionalityResult, config: EvaluationConfig) -> str:
    """Build `results.md`: our figures above the paper's, in percent, with a newline at the end."""
    title = f"# {result.benchmark.title}: {config.model_name or 'model'}, prompt `{config.prompt_mode}`"
    title += described(config)
    note = f"Accuracy in percent, a tie is wrong. {result.num_scored} scored, {len(result.errors)} set aside."
    if config.limit is not None:
        note += f" Only the first {config.limit} records of each set."
    parts = [title, note, " ".join(_obtained(config)), as_markdown(_table(result))]
    groups = _groups(result, config)
    parts += ["In UniME's grouping, beside its figures:", as_markdown(groups)] if groups else []
    return "\n\n".join(parts) + "\n"


def _obtained(config: EvaluationConfig) -> list[str]:
    """Return how our figures were obtained, and the paper's."""
    return [
        f"Ours: {method_of(config).sentence()}",
        "The paper's: backbone in brackets; 1 forward per query, nothing unlabelled, no reranking.",
    ]


def text_table(result: CompositionalityResult, config: EvaluationConfig) -> str:
    """Build the table of `results.md` for a terminal, with rows and columns exchanged so that it is narrow."""
    turned = [list(column) for column in zip(*_table(result), strict=True)]
    methods = turned[0][2:]
    turned[0] = ["", "ours", *(f"[{number}]" for number in range(1, 1 + len(methods)))]
    legend = [f"[{number}] {method}" for number, method in enumerate(methods, start=1)]
    groups = _groups(result, config)
    parts = [as_text(turned), "", *legend, ""]
    parts += ["In UniME's grouping, beside its figures", "", as_text(groups), ""] if groups else []
    return "\n".join([*parts, *_obtained(config)])


def _groups(result: CompositionalityResult, config: EvaluationConfig) -> Table | None:
    """Build the table of UniME's groups and their mean; None for SugarCrepe++, or where captions have the prefix."""
    if not config.plain_captions or len(result.benchmark.tasks) > 1:
        return None
    return groups_table(result)


def groups_table(result: CompositionalityResult) -> Table:
    """Build the table of UniME's groups and their mean, ours above UniME's and E5-V's; captions have no prefix.

    Args:
        result: The outcome of SugarCrepe.
    """
    ours = list(groups_of(result).values())
    known = [figure for figure in ours if figure is not None]
    mean = sum(known) / len(known) if len(known) == len(ours) else None
    table: Table = [["", *GROUPS, "mean"], ["ours", *map(percent, ours), percent(mean)]]
    return table + [
        [method, *(f"{figure:.1f}" for figure in figures), f"{sum(figures) / len(figures):.1f}"]
        for method, figures in published_groups().items()
    ]


def groups_of(result: CompositionalityResult) -> dict[str, float | None]:
    """Return the mean accuracy of each of UniME's groups, in [0, 1]; None without all of its sets."""
    return of_groups({score.name: score.accuracy("itt") for score in result.scores})


def _table(result: CompositionalityResult) -> Table:
    """Build the table with one row per method and one column per set, as in the paper's Table VI."""
    tasks = result.benchmark.tasks
    ours = [percent(score.accuracy(task)) for score in result.scores for task in tasks]
    head = [
        f"{score.name} {task.upper()}" if len(tasks) > 1 else score.name for score in result.scores for task in tasks
    ]
    averages = [percent(result.overall(task)) for task in tasks]
    names = ["Avg. " + task.upper() for task in tasks] if len(tasks) > 1 else ["Avg."]
    table: Table = [["", *head, *names], ["ours", *ours, *averages]]
    if len(tasks) == 1:
        table += [[f"paper, VI: {label}", *["–"] * len(head), f"{mean:.1f}"] for label, mean in SUGARCREPE.items()]
        return table
    for label, figures in SUGARCREPE_PLUS.items():
        cells = [f"{cell:.1f}" for score in result.scores for cell in figures[score.name]]
        table.append([f"paper, VI: {label}", *cells, *["–"] * len(names)])
    return table
