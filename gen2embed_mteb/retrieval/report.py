"""The reports of a retrieval run: `results.json`, and tables with the published figures."""

from __future__ import annotations

from typing import Any

from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.evaluation.method import Method, comparable_only, described, method_of
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.run_folder import run_settings
from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.retrieval.compositional import SUGARCREPE, why_left_out
from gen2embed_mteb.retrieval.published import COLUMNS, recall_at_1, remarks
from gen2embed_mteb.retrieval.scoring import CUTS, DIRECTIONS, RetrievalResult
from gen2embed_mteb.sugarcrepe.report import groups_of, groups_table, sets_json
from gen2embed_mteb.sugarcrepe.scoring import CompositionalityResult

_GROUPS = "SugarCrepe in UniME's grouping, captions without a prefix, beside published figures"
_SHOWN = {"text_to_image": "text → image", "image_to_text": "image → text"}


def results_json(result: RetrievalResult, config: EvaluationConfig) -> dict[str, Any]:
    """Build the content of `results.json`.

    Args:
        result: The run's outcome.
        config: Its settings.

    Returns:
        By dataset and direction: `recall_at_1`, …, and `…_strict`, which counts ties against the model, in [0, 1];
        where SugarCrepe is a part of the run, its sets and UniME's groups.
    """
    return {
        "model": config.model_name,
        "revision": config.revision,
        "prompt_mode": config.prompt_mode,
        **({} if config.readout == "last" else {"readout": config.readout}),
        "benchmark": result.name,
        "method": _method(result, config).to_json(),
        "settings": run_settings(config),
        "datasets": {
            score.dataset.name: {
                **{
                    direction: {
                        f"recall_at_{k}{'_strict' if strict else ''}": score.ranks[direction].recall(k, strict=strict)
                        for strict in (False, True)
                        for k in CUTS
                    }
                    for direction in DIRECTIONS
                },
                "num_images": score.num_images,
                "num_captions": score.num_captions,
                "num_errors": score.num_errors,
                **({"num_unlabelled_inputs": score.num_unlabelled} if config.transductive else {}),
            }
            for score in result.scores
        },
        **_captions_json(result.captions),
        "fingerprint": config.fingerprint,
        "versions": installed_versions(),
        "seconds": round(result.seconds, 3),
    }


def markdown(result: RetrievalResult, config: EvaluationConfig) -> str:
    """Build `results.md`: our figures, then recall at 1 beside the published ones, with a newline at the end."""
    title = f"# Retrieval: {config.model_name or 'model'}, prompt `{config.prompt_mode}`{described(config)}"
    parts = [title, *_notes(result, config), *([as_markdown(_table(result))] if result.scores else [])]
    published = _published(result)
    if published:
        parts += ["Recall at 1 beside published figures:", as_markdown(published)]
    if result.captions:
        parts += [f"{_GROUPS}:", as_markdown(groups_table(result.captions))]
    return "\n\n".join(parts) + "\n"


def text_table(result: RetrievalResult, config: EvaluationConfig) -> str:
    """Build the same for a terminal."""
    parts = [as_text(_table(result))] if result.scores else []
    published = _published(result)
    if published:
        parts += ["Recall at 1 beside published figures", as_text(published)]
    if result.captions:
        parts += [_GROUPS, as_text(groups_table(result.captions))]
    return "\n\n".join([*parts, *_notes(result, config)])


def _captions_json(captions: CompositionalityResult | None) -> dict[str, Any]:
    return {} if captions is None else {SUGARCREPE: {"datasets": sets_json(captions), "groups": groups_of(captions)}}


def _method(result: RetrievalResult, config: EvaluationConfig) -> Method:
    return method_of(config, sum(sum(score.num_unlabelled.values()) for score in result.scores))


def _table(result: RetrievalResult) -> Table:
    """Build the table of our figures: one row per dataset and direction, official and strict."""
    table: Table = [["dataset", "direction", *(f"R@{k}" for k in CUTS), "R@1, strict", "queries"]]
    for score in result.scores:
        for direction in DIRECTIONS:
            ranks = score.ranks[direction]
            figures = [percent(ranks.recall(k)) for k in CUTS]
            row = [score.dataset.title, _SHOWN[direction], *figures, percent(ranks.recall(1, strict=True))]
            table.append([*row, str(len(ranks.official))])
    return table


def _published(result: RetrievalResult) -> Table | None:
    """Build the table of recall at 1 by direction with the published rows; None if no dataset has any."""
    known = {score.dataset.name: score for score in result.scores}
    columns = [column for column in COLUMNS if column[0] in known]
    if not columns:
        return None
    heads = [f"{known[name].dataset.title}, {_SHOWN[direction]}" for name, direction in columns]
    ours = [percent(known[name].ranks[direction].recall(1)) for name, direction in columns]
    table: Table = [["", *heads], ["ours", *ours]]
    rows = recall_at_1().items()
    return table + [[method, *(f"{figures[COLUMNS[column]]:.1f}" for column in columns)] for method, figures in rows]


def _notes(result: RetrievalResult, config: EvaluationConfig) -> list[str]:
    note = "Recall in percent; an image is found by any of its captions. Strict: a tie counts against the model. "
    images = sum(score.num_images for score in result.scores)
    note += f"{images} images scored, {sum(score.num_errors for score in result.scores)} set aside."
    if result.captions:
        note += f" SugarCrepe: {result.captions.num_scored} records scored, {len(result.captions.errors)} set aside."
    if config.limit is not None:
        note += f" Only the first {config.limit} images of each dataset, so that all is easier to find."
    notes = [
        note,
        f"Ours: {_method(result, config).sentence()} Queries are encoded as queries and candidates as candidates, so "
        "each image and each caption is encoded twice.",
    ]
    notes += filter(None, [comparable_only(_method(result, config))])
    notes += filter(None, [why_left_out(result.name, config)])
    if _published(result) or result.captions:
        notes.append(
            "Published: UniME's paper (arXiv 2504.17432v4, Table 2), backbone in brackets; 1 forward per query, "
            "nothing unlabelled, no reranking."
        )
        notes.append(" ".join(remarks()))
    return notes
