"""Writes the model card's sections on data (what was sampled, how, with which model, from where) and on widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gen2embed_mteb.evaluation.tables import Table, as_markdown
from gen2embed_mteb.storage.atomic import write_in_scratch
from trainers.batches.dataset import TrainingSet
from trainers.sampling.files import MEANING, Sampling

STATED_COUNTS = ("positives", "explicit_negatives")
_CARD_SECTION_BEFORE = "\n### Framework Versions"


def data_section(samplings: Sequence[Sampling], training_set: TrainingSet, base_model: str) -> str:
    """Return a section in Markdown that says where the training batches came from.

    Args:
        samplings: The sampling files.
        training_set: The training set that was made of them.
        base_model: The model that was trained.

    Returns:
        The section, with its heading.
    """
    first = samplings[0].record
    method, data, model = first["method"], first["data"], first["model"]
    settings = {name: value for name, value in first["settings"].items() if value not in (None, False)}
    lines = [
        "### Hard Negatives",
        "",
        f"- Method: `{method}`; {MEANING[method]}",
        f"- Settings: {', '.join(f'`{name}` {value}' for name, value in settings.items())}",
        f"- Data: `{data['data_dir']}`, split `{data['split']}`",
        f"- Trained from: `{base_model}`",
    ]
    if model["fingerprint"]:
        by = " ".join(filter(None, (model["name"], model["revision"])))
        lines.append(
            f"- Sampled by `{by}` with the prompt `{model['prompt_mode']}`, fingerprint `{model['fingerprint']}`"
        )
    if training_set.num_drawn:
        lines.append(f"- Negatives drawn at random, for queries with too few of their own: {training_set.num_drawn:,}")
    stated = {name: sum(one.record["counts"].get(name, 0) for one in samplings) for name in STATED_COUNTS}
    if stated["positives"]:
        lines.append(
            f"- Positives: {stated['positives']:,} in subsets whose queries have several; an epoch takes one per query"
        )
    if stated["explicit_negatives"]:
        lines.append(f"- Explicit negatives in the data: {stated['explicit_negatives']:,}")
    table: Table = [["Subset", "Sampling file", "Rows", "Clusters", "SHA-256 of the file"]]
    for sampling in samplings:
        record = sampling.record
        counts = [f"{record['data']['num_rows']:,}", f"{record['counts']['clusters']:,}"]
        table.append([record["subset"], f"`{record['file']}`", *counts, f"`{record['sha256']}`"])
    return "\n".join([*lines, "", as_markdown(table)])


def widths_section(dims: Sequence[int], weights: Sequence[float], metrics: Mapping[str, float]) -> str:
    """Return a section in Markdown that says at which widths the loss was computed, with a figure of each.

    Args:
        dims: The widths; empty: there is no section.
        weights: Their weights; empty: 1 for each.
        metrics: The last evaluation's metrics, which may have figures of these widths (see `evaluator.py`).

    Returns:
        The section, with its heading; empty without widths.
    """
    if not dims:
        return ""
    lines = [
        "### Matryoshka Dimensions",
        "",
        "The loss was computed on whole vectors and on their first dimensions, so that these can be used alone:",
        f"`SentenceTransformer(…, truncate_dim={dims[-1]})`. Cut vectors have lengths below 1; pass",
        "`normalize_embeddings=True` to `encode` where they are compared by inner products.",
    ]
    figures = {name: figure for name, figure in metrics.items() if name.endswith("_overall")}
    widths = [*dims]
    found = [
        next((figure for name, figure in figures.items() if name.endswith(f"_dim_{width}_overall")), None)
        for width in widths
    ]
    whole = next((figure for name, figure in figures.items() if "_dim_" not in name), None)
    if found[0] is None:
        found[0] = whole  # the model's own width has no figure of its own
    has_figures = whole is not None
    table: Table = [["Dimensions", "Weight", *(["Precision@1, overall"] if has_figures else [])]]
    for width, weight, figure in zip(widths, weights or [1.0] * len(dims), found, strict=True):
        shown = "" if figure is None else f"{100 * figure:.1f}"
        table.append([f"{width:,}", f"{weight:g}", *([shown] if has_figures else [])])
    return "\n\n" + "\n".join([*lines, "", as_markdown(table)])


def add_to_card(path: Path, section: str) -> None:
    """Put a section before the versions, or at the end of a card without them.

    Args:
        path: The card, in a temporary folder of ours; if there is no card, nothing is done.
        section: The section in Markdown; if it is empty, nothing is done.
    """
    if not section or not path.is_file():
        return
    card = path.read_text(encoding="utf-8")
    before, mark, after = card.partition(_CARD_SECTION_BEFORE)
    write_in_scratch(path, f"{before.rstrip()}\n\n{section.strip()}\n{mark}{after}".encode())
