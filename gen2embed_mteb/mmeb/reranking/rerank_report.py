"""What reranking did, for `results.json` and the tables: both figures, the cost, and whether the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.method import method_of
from gen2embed_mteb.evaluation.tables import Table, percent
from gen2embed_mteb.mmeb.scoring import Averages, DatasetReranking, DatasetScore, EvaluationResult, average

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.reranking.health import Health


def rerank_json(result: EvaluationResult, config: EvaluationConfig) -> dict[str, Any]:
    """Build the entry `rerank` of `results.json`; nothing without reranking.

    `before` are figures of the embedding, of the rows that were reranked, and `after` those of the same rows.

    Args:
        result: The run's outcome.
        config: Its settings.
    """
    if not result.reranked:
        return {}
    done = _done(result)
    own_inputs = sum(score.num_unlabelled for score in result.scores)
    return {
        "rerank": {
            **config.rerank_settings(),
            "method": method_of(config, own_inputs, reranked=True).to_json(),
            "before": _averages([one.before for one in done]),
            "after": _averages([one.after for one in done]),
            "datasets": {one.after.dataset.name: _dataset_json(one, config) for one in result.reranked},
            **_cost(done),
            **_health_json(done, config),
        }
    }


def rerank_table(result: EvaluationResult, config: EvaluationConfig) -> Table:
    """Build the table of reranking, figures in percent; empty without it.

    Args:
        result: The run's outcome.
        config: Its settings.
    """
    if not result.reranked:
        return []
    table: Table = [
        ["reranked", "rows", "P@1", "after", "strict", "after", "tokens", "saved", "mass", "share of first"]
    ]
    done = _done(result)
    for one in done:
        table.append([one.after.dataset.name, str(len(one.after.rows)), *_figures([one]), *_shown(one)])
    total = [str(sum(len(one.after.rows) for one in done)), *_figures(done), *_shown(_summed(done))] if done else []
    return [*table, ["mean of datasets", *total]] if done else table


def rerank_notes(result: EvaluationResult, config: EvaluationConfig) -> list[str]:
    """Return what must be said beside the table: what was reranked, skipped datasets, and whether the model answers.

    Args:
        result: The run's outcome.
        config: Its settings.
    """
    if not result.reranked:
        return []
    done = _done(result)
    seconds = sum(one.seconds for one in done)
    added = f" plus {config.rerank_weight:g} times the embedding's score" if config.rerank_weight else ""
    notes = [
        f"Reranked: the best {config.rerank_top} candidates of each row, framing {config.rerank}{added}, "
        f"{seconds:.0f} s; before and after are of the same rows."
    ]
    skipped = [f"{one.after.dataset.name} ({one.skipped})" for one in result.reranked if one.skipped]
    if skipped:
        notes.append(f"Not reranked: {'; '.join(skipped)}.")
    health = health_of(done, config)
    if health is not None and health.warning:
        notes.append(f"WARNING: {health.warning}.")
    return notes


def health_of(done: Sequence[DatasetReranking], config: EvaluationConfig) -> Health | None:
    """Return whether the model answers, over all datasets; `None` if no answer was read.

    Args:
        done: The datasets that were reranked.
        config: The run's settings.
    """
    from gen2embed_mteb.embedder.reranking.framings import framing_of
    from gen2embed_mteb.embedder.reranking.health import Health

    answers = sum(one.answers for one in done)
    if answers == 0 or config.rerank is None:
        return None
    framing = framing_of(config.rerank)
    mass, first = sum(one.mass for one in done), sum(one.first for one in done)
    return Health(answers, mass / answers, first / answers, (framing.yes, framing.no))


def rerank_averages(result: EvaluationResult, config: EvaluationConfig) -> list[tuple[str, Averages]]:
    """Return the averages after reranking by the official and the strict rule, each with a label; none without it.

    The label says of what part of the benchmark they are, if not of all rows.

    Args:
        result: The run's outcome.
        config: Its settings.
    """
    done = _done(result)
    if not done:
        return []
    label = f"ours, top {config.rerank_top} reranked"
    if len(done) < len(result.scores):
        label += f", {len(done)} of {len(result.scores)} datasets"
    if config.rerank_limit is not None:
        label += f", first {config.rerank_limit} rows"
    after = [one.after for one in done]
    return [(label, average(after)), (f"{label}, strict", average(after, strict=True))]


def _done(result: EvaluationResult) -> list[DatasetReranking]:
    return [one for one in result.reranked if not one.skipped]


def _averages(scores: Sequence[DatasetScore]) -> dict[str, Any]:
    official, strict = average(scores), average(scores, strict=True)
    return {
        "precision_at_1": official.overall,
        "precision_at_1_strict": strict.overall,
        "meta_tasks": official.meta_tasks,
        "meta_tasks_strict": strict.meta_tasks,
    }


def _dataset_json(one: DatasetReranking, config: EvaluationConfig) -> dict[str, Any]:
    if one.skipped:
        return {"skipped": one.skipped}
    return {
        "precision_at_1_before": one.before.precision_at_1,
        "precision_at_1_after": one.after.precision_at_1,
        "precision_at_1_strict_before": one.before.precision_at_1_strict,
        "precision_at_1_strict_after": one.after.precision_at_1_strict,
        "num_queries": len(one.after.rows),
        "num_errors": one.after.num_errors,
        **_cost([one]),
        **_health_json([one], config),
    }


def _cost(done: Sequence[DatasetReranking]) -> dict[str, Any]:
    whole = _summed(done)
    return {
        "num_pairs": whole.num_pairs,
        "num_tokens": whole.num_tokens,
        "num_tokens_saved": whole.num_tokens_in_full - whole.num_tokens,
        "seconds": round(whole.seconds, 3),
    }


def _health_json(done: Sequence[DatasetReranking], config: EvaluationConfig) -> dict[str, Any]:
    health = health_of(done, config)
    if health is None:
        return {}
    return {
        "answers": health.answers,
        "mass_on_options": health.mass,
        "share_of_first_option": health.share,
        "warning": health.warning,
    }


def _figures(done: Sequence[DatasetReranking]) -> list[str]:
    found: list[Averages] = []
    for strict in (False, True):
        found += [average([getattr(one, side) for one in done], strict=strict) for side in ("before", "after")]
    return [percent(one.overall) for one in found]


def _summed(done: Sequence[DatasetReranking]) -> DatasetReranking:
    """Return the counts of several datasets together; the scores are those of the first one."""
    names = ("num_pairs", "answers", "mass", "first", "num_tokens", "num_tokens_in_full", "seconds")
    sums = {name: sum(getattr(one, name) for one in done) for name in names}
    none = DatasetScore(done[0].after.dataset, ()) if done else None
    return DatasetReranking(none, none, **sums)  # type: ignore[arg-type]


def _shown(one: DatasetReranking) -> list[str]:
    saved = 1 - one.num_tokens / one.num_tokens_in_full if one.num_tokens_in_full else 0.0
    health = ["–", "–"]
    if one.answers:
        health = [f"{one.mass / one.answers:.2g}", f"{100 * one.first / one.answers:.0f} %"]
    return [f"{one.num_tokens:,}", f"{100 * saved:.0f} %", *health]
