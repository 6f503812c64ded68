"""The notes under a table: what our figures were measured on, and what must be known to compare them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gen2embed_mteb.retrieval.published import GAIN, HEADS
from gen2embed_mteb.table_command.options import RAW, TRAINED, TableOptions
from gen2embed_mteb.table_command.plans import Plan
from gen2embed_mteb.table_command.records import datasets_of, parsed, results_of, set_aside

_OF_TABLE = {
    "II": (
        "The paper copies UniME's 40.3, a mean over four meta-tasks, beside means over 36 datasets; over 36 datasets "
        "UniME's row is 37.0. The row Qwen2-VL-2B is Table IV's No-Prompt, measured twice: 13.9 and 14.2.",
    ),
    "III": (
        "Another experiment than the paper's: the paper detached the representation prompts from MMEB's texts and put "
        "a sentence of its own for each dataset in their place, and that data was never published. Ours are MMEB's "
        "texts as they are, with one general sentence: compare the order of the rows, not the figures.",
        "Avg. Score is the mean over all datasets, Avg. Task the mean of the four meta-tasks' means.",
    ),
    "V": (
        "Classification, VQA, Retrieval and Grounding are 10, 10, 12 and 4 datasets; IND 20, OOD 16, Overall 36.",
        "The paper copies UniME's 64.2 and 66.6, means over four meta-tasks, beside means over 36 datasets.",
    ),
    "VI": (
        "SugarCrepe is the mean over its seven sets. Captions are queries and images are candidates, as in the "
        "official code.",
    ),
    "VII": (
        "Ours search hard negatives once, with the model before training; the paper searches with the model as it is "
        "trained. # Batch is clusters for SaHa, queries for HN, pairs for in-batch. The pool multiplier is 4 for k = 7 "
        "(its figures are those of Table VIII's 4) and 6 for k = 15, where the paper does not say it. The time of ours "
        "is that of training alone.",
    ),
    "VIII": ("Ours search the baseline's hard negatives once, with the model before training.",),
    "unime-mmeb": (
        "Overall of the published rows is the mean of the four meta-tasks, but for UniME (LLaVA-OneVision); Overall of "
        "ours is the mean over all datasets.",
        "Prompt raw is MMEB's text alone, in no turn: so were UniME, E5-V and VLM2Vec evaluated.",
    ),
    "unime-diverse": (
        f"{HEADS} {GAIN}",
        "SugarCrepe's three groups are plain means over their sets; how UniME averages them is not published. Ours are "
        "run where --data_dir has a folder sugarcrepe, with COCO's val2017 in it or beside it.",
    ),
}


def notes_of(plan: Plan) -> list[str]:
    """Return the notes of a table whose runs are finished, sentence by sentence.

    Args:
        plan: What was run.
    """
    options = plan.options
    notes = list(_OF_TABLE.get(options.table, ()))
    if not plan.rows:
        return notes
    notes += _data(plan)
    if options.table in TRAINED and any(row.training for row in plan.rows):
        notes.append(_training(options))
    notes += _models(plan)
    for run in plan.runs:
        if run.command == "evaluate" and (counts := set_aside(results_of(run)))[0]:
            notes.append(f"{counts[0]:,} of {counts[1]:,} rows were set aside in {run.folder}; see its errors.jsonl.")
    return notes


def _data(plan: Plan) -> Iterator[str]:
    """Yield a sentence about each benchmark that was run here."""
    options = plan.options
    evaluations = [run for run in plan.runs if run.command == "evaluate"]
    for benchmark, run in {parsed(run).benchmark: run for run in reversed(evaluations)}.items():
        kind = "sets" if benchmark.startswith("sugarcrepe") else "datasets"
        rows = f"the first {_count(options.limit, 'row')} of each" if options.limit else "all rows"
        yield f"Run here: {benchmark}, {len(datasets_of(run)[1])} {kind}, {rows}."
    if options.mini:
        yield "The benchmarks are small ones that were drawn, not the paper's: compare the order of rows, not figures."
    elif options.limit:
        yield "The published figures are of all rows: compare them with a run on all of them."


def _models(plan: Plan) -> Iterator[str]:
    """Yield a sentence about each model of ours: its name, revision, layouts and digest."""
    results: dict[str, list[Any]] = {}
    for row in plan.rows:
        results.setdefault(row.model, []).extend(results_of(run) for run in row.evaluations)
    for model, found in results.items():
        revisions = sorted({one["revision"] for one in found if one["revision"]})
        layouts = [plan.options.layout, *([RAW] if RAW in _modes(plan.options) else [])]
        said = [f"revision {', '.join(revisions)}"] if revisions else []
        said += [f"layout {', '.join(dict.fromkeys(layouts))}"]
        backbones = sorted({one["method"]["backbone"] for one in found} - {model})
        said += [f"backbone {', '.join(backbones)}"] if backbones and len(found) == 1 else []
        versions = found[0]["versions"]
        yield f"{model}: {'; '.join(said)}; gen2embed {versions.get('gen2embed', 'of a checkout')}."


def _modes(options: TableOptions) -> tuple[str, ...]:
    return options.modes if options.table in ("II", "VI", "unime-mmeb", "unime-diverse") else ()


def _training(options: TableOptions) -> str:
    """Return a sentence about how the models were trained."""
    training = options.training
    length = _count(training.max_steps, "step") if training.max_steps else f"{training.num_epochs:g} epochs, in steps"
    pairs = (
        f"the first {_count(training.train_limit, 'pair')} of each subset"
        if training.train_limit
        else "all training pairs"
    )
    return (
        f"Trained here on {pairs}: {length} of {training.batch_size} pairs for SaHa, as many pairs for the others in "
        f"steps of a half (in-batch) or an eighth (HN); learning rate {training.learning_rate:g}; {training.variant} "
        "variant of SaHa; nothing is masked in the loss. One seed."
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
