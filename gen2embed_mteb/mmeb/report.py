"""The reports of a run: `results.json`, tables in Markdown and for the terminal, and the official score files.

| file              | form                                                                                       |
|-------------------|--------------------------------------------------------------------------------------------|
| `results.json`    | everything, figures in [0, 1]; the same run gives the same bytes, except for `seconds`      |
| `results.md`      | tables with published figures beside ours, in percent, and how each was obtained           |
| `{S}_score.json`  | the form of VLM2Vec's V1 for a dataset S: `acc`, `num_correct`, `num_pred`                  |
| `leaderboard.json`| the form of VLM2Vec's V2: `{"metadata": …, "metrics": {"image": {S: {"hit@1": …}}}}`         |
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.method import Method, comparable_only, described, method_of, methods_table
from gen2embed_mteb.evaluation.paper import notes_beside, rows_beside
from gen2embed_mteb.evaluation.run import errors_bytes, installed_versions
from gen2embed_mteb.evaluation.run_folder import RESULTS, SCORE_SUFFIX, begin_reports, run_settings
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.mmeb.reranking.rerank_report import rerank_averages, rerank_json, rerank_notes, rerank_table
from gen2embed_mteb.mmeb.scoring import Averages, EvaluationResult, average, dataset_figures, ranking_metrics

LEADERBOARD_METADATA = (
    "model_name",
    "model_backbone",
    "model_size",
    "embedding_dimension",
    "max_length_tokens",
    "model_release_date",
    "data_source",
    "url",
)
"""The keys of a leaderboard entry's metadata; the value is null if a run does not know it."""


def results_json(result: EvaluationResult, config: EvaluationConfig) -> dict[str, Any]:
    """Build the content of `results.json`.

    Args:
        result: The run's outcome.
        config: Its settings.

    Returns:
        Figures in [0, 1], or None if no row was scored; `num_queries` counts the scored rows, `num_errors` the rows
        that were set aside, `num_unlabelled_inputs` the dataset's own inputs that a transductive run used.
    """
    official, strict = average(result.scores), average(result.scores, strict=True)
    return {
        "model": config.model_name,
        "revision": config.revision,
        "prompt_mode": config.prompt_mode,
        **({} if config.readout == "last" else {"readout": config.readout}),
        "benchmark": result.benchmark.name,
        "method": _method(result, config).to_json(),
        "settings": run_settings(config),
        "datasets": {
            score.dataset.name: {
                **dataset_figures(score),
                **({"num_unlabelled_inputs": score.num_unlabelled} if config.transductive else {}),
            }
            for score in result.scores
        },
        "meta_tasks": {
            task: {
                "precision_at_1": figure,
                "precision_at_1_strict": strict.meta_tasks[task],
                "num_datasets": sum(score.dataset.meta_task == task for score in result.scores),
            }
            for task, figure in official.meta_tasks.items()
        },
        "ind": official.ind,
        "ood": official.ood,
        "overall": official.overall,
        **rerank_json(result, config),
        "fingerprint": config.fingerprint,
        "versions": installed_versions(),
        "seconds": round(result.seconds, 3),
    }


def write_reports(result: EvaluationResult, config: EvaluationConfig) -> None:
    """Write all reports into `config.output_dir`, each atomically, `results.json` last; delete those of another run.

    Args:
        result: The run's outcome.
        config: Its settings.

    Raises:
        ForeignFileError: An earlier report was changed since we wrote it.
    """
    folder = begin_reports(config, result.benchmark.name)
    for score in result.scores:
        acc = score.precision_at_1 or 0.0
        official = {"acc": acc, "num_correct": score.num_correct, "num_pred": len(score.rows)}
        folder.write_json(f"{score.dataset.name}{SCORE_SUFFIX}", official)
    folder.write("errors.jsonl", errors_bytes(list(result.errors)))
    folder.write_json("leaderboard.json", leaderboard_json(result, config))
    folder.write("results.md", markdown(result, config).encode("utf-8", "backslashreplace"))
    folder.write_json(RESULTS, results_json(result, config))


def leaderboard_json(result: EvaluationResult, config: EvaluationConfig) -> dict[str, Any]:
    """Build the entry for the MMEB leaderboard, in VLM2Vec V2's form.

    Args:
        result: The run's outcome.
        config: Its settings; `config.leaderboard` fills or overrides the metadata.

    Returns:
        `metadata` and `metrics`, the latter by modality (`image`) and dataset.
    """
    metrics = {score.dataset.name: ranking_metrics(score) for score in result.scores}
    return leaderboard_entry({"model_name": config.model_name, **config.leaderboard}, {"image": metrics})


def leaderboard_entry(known: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Build a leaderboard entry.

    Args:
        known: Metadata, by the names in `LEADERBOARD_METADATA`; missing values become null.
        metrics: Figures by modality, dataset and name.

    Returns:
        `metadata`, with the time of this call, and `metrics`.
    """
    metadata = {**dict.fromkeys(LEADERBOARD_METADATA), "data_source": "Self-Reported", **known}
    metadata["report_generated_date"] = datetime.datetime.now(datetime.UTC).isoformat()
    return {"metadata": metadata, "metrics": dict(metrics)}


def markdown(result: EvaluationResult, config: EvaluationConfig) -> str:
    """Build `results.md`: averages beside published ones and how each was obtained, then every dataset.

    Args:
        result: The run's outcome.
        config: Its settings.

    Returns:
        GitHub's Markdown with a newline at the end; figures in percent.
    """
    averages, methods, datasets = _tables(result, config)
    title = f"# {result.benchmark.title}: {config.model_name or 'model'}, prompt `{config.prompt_mode}`"
    title += described(config)
    notes = [
        "Precision@1 in percent. *strict*: a tie with the positive does not count as a hit.",
        f"{sum(len(score.rows) for score in result.scores)} rows scored, {len(result.errors)} set aside.",
    ]
    if config.limit is not None:
        notes.append(f"Only the first {config.limit} rows of each dataset.")
    notes += filter(None, [comparable_only(_method(result, config))])
    if result.benchmark.name == "mmeb":
        notes.append("The paper's rows are of all 36 datasets; compare them with a run on all of them.")
    else:
        notes.append("The paper's rows are of MMEB itself: compare the order of the strategies, not the figures.")
    notes += [note[:1].upper() + note[1:] for note in notes_beside(config.prompt_mode)]
    both = [figures + method[1:] for figures, method in zip(averages, methods, strict=True)]
    parts = [title, " ".join(notes), as_markdown(both), as_markdown(datasets)]
    reranked = rerank_table(result, config)
    parts += [" ".join(rerank_notes(result, config)), as_markdown(reranked)] if reranked else []
    return "\n\n".join(parts) + "\n"


def text_table(result: EvaluationResult, config: EvaluationConfig) -> str:
    """Build the tables of `results.md` for a terminal.

    Args:
        result: The run's outcome.
        config: Its settings.

    Returns:
        Aligned columns, without a newline at the end.
    """
    averages, methods, datasets = _tables(result, config)
    notes = filter(None, [comparable_only(_method(result, config)), *notes_beside(config.prompt_mode)])
    parts = [as_text(datasets), as_text(averages), as_text(methods), *notes]
    reranked = rerank_table(result, config)
    parts += [as_text(reranked), "\n".join(rerank_notes(result, config))] if reranked else []
    return "\n\n".join(parts)


def averages_table(runs: Sequence[tuple[str, Averages]], prompt_mode: str) -> Table:
    """Build the table of averages, followed by the paper's rows.

    Args:
        runs: A label and averages per run; the first run decides which meta-tasks are shown.
        prompt_mode: The strategy, which chooses the paper's rows.

    Returns:
        One column per meta-task, then IND, OOD and Overall, in percent.
    """
    columns = [*runs[0][1].meta_tasks, "IND", "OOD", "Overall"]
    table: Table = [["", *columns]]
    for label, averages in runs:
        found = _by_column(averages)
        table.append([label, *(percent(found.get(column)) for column in columns)])
    for row in rows_beside(prompt_mode):
        printed = {"IND": row.figures.get("ind"), "OOD": row.figures.get("ood"), "Overall": row.figures["overall"]}
        figures = {**row.figures, **printed}
        beside = (figures.get(column) for column in columns)
        table.append([row.title, *("–" if cell is None else f"{cell:.1f}" for cell in beside)])
    return table


def methods_beside(runs: Sequence[tuple[str, Method]], prompt_mode: str) -> Table:
    """Build the table of how each row of `averages_table` was obtained, with the same rows.

    Args:
        runs: A label and a method per run.
        prompt_mode: The strategy, which chooses the paper's rows.
    """
    return methods_table([*runs, *((row.title, row.method) for row in rows_beside(prompt_mode))])


def _method(result: EvaluationResult, config: EvaluationConfig, *, reranked: bool = False) -> Method:
    return method_of(config, sum(score.num_unlabelled for score in result.scores), reranked=reranked)


def _tables(result: EvaluationResult, config: EvaluationConfig) -> tuple[Table, Table, Table]:
    """Return the averages, how each was obtained, and the figures of the datasets."""
    ours = [
        ("ours", average(result.scores)),
        ("ours, strict", average(result.scores, strict=True)),
    ]
    reranked = rerank_averages(result, config)
    averages = averages_table([*ours, *reranked], config.prompt_mode)
    how = [(label, _method(result, config)) for label, _ in ours]
    how += [(label, _method(result, config, reranked=True)) for label, _ in reranked]
    methods = methods_beside(how, config.prompt_mode)
    datasets: Table = [["dataset", "meta-task", "domain", "P@1", "strict", "rows", "set aside"]]
    for score in result.scores:
        dataset = score.dataset
        datasets.append(
            [
                dataset.name,
                dataset.meta_task,
                "IND" if dataset.in_domain else "OOD",
                percent(score.precision_at_1),
                percent(score.precision_at_1_strict),
                str(len(score.rows)),
                str(score.num_errors),
            ]
        )
    return averages, methods, datasets


def _by_column(averages: Averages) -> dict[str, float | None]:
    return {**averages.meta_tasks, "IND": averages.ind, "OOD": averages.ood, "Overall": averages.overall}
