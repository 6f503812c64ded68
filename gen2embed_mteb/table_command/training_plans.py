"""How the models of Tables V, VII and VIII are made: what is sampled, and how long is trained on it.

A step of SaHa has 2,048 pairs in the paper (256 clusters of 8, or 128 of 16), one of in-batch 1,024, one of plain hard
negatives 256 queries, each with negatives of its own. These proportions are kept if the batch is another one, and every
row sees the same number of pairs, as in the paper, where each takes 1.5 epochs.

The pool multiplier of Table VII's rows is not published; its SaHa with k = 7 has the figures of Table VIII's multiplier
4. With k = 15 the 6 of the official README is taken. Nothing is masked in the loss, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.paper_tables.published import published
from gen2embed_mteb.table_command.options import Training

WARMUP_SHARE = 6
"""Where the warm-up is not given, it is the steps divided by this."""


@dataclass(frozen=True)
class Trained:
    """How one model is made.

    Attributes:
        name: The name for its folders.
        title: The name in tables.
        method: `--method` of `sample`.
        prompt_mode: The strategy in sampling, training and evaluation.
        sampling: More words of `sample`.
        training: Words of `train`.
        labels: The cells of the label columns.
        after: As in `view.OurFigures`.
    """

    name: str
    title: str
    method: str
    prompt_mode: str
    sampling: tuple[str, ...]
    training: tuple[str, ...]
    labels: tuple[str, ...] = ()
    after: str = ""


@dataclass(frozen=True)
class _Method:
    """A method of Table VII or VIII: its negatives, and for SaHa its pool."""

    method: str
    k: int = 0
    pool: int = 0
    prompt_mode: str = "hierarchical"

    @property
    def name(self) -> str:
        parts = [self.method, *([f"k{self.k}"] if self.k else []), *([f"m{self.pool}"] if self.pool else [])]
        return "-".join([*parts, *([self.prompt_mode] if self.prompt_mode != "hierarchical" else [])])


_VII = {
    "VLM2Vec, in-batch, no prompt": _Method("in-batch", prompt_mode="none"),
    "In-batch": _Method("in-batch"),
    "HN, k = 1": _Method("hn", 1),
    "HN, k = 7": _Method("hn", 7),
    "HN + beta, k = 7": _Method("hn-beta", 7),
    "SaHa, k = 7": _Method("saha", 7, 4),
    "SaHa, k = 15": _Method("saha", 15, 6),
}
_VIII = {
    "baseline": _Method("hn", 7),
    "pool-4": _Method("saha", 7, 4),
    "pool-6": _Method("saha", 7, 6),
    "pool-8": _Method("saha", 7, 8),
}
_PER_STEP = {"saha": 1, "in-batch": 2, "hn": 8, "hn-beta": 8}
"""How many steps of a method see as many pairs as one step of SaHa."""


def recipes(table: str, training: Training) -> list[Trained]:
    """Return how the models of a table are made, in the table's order.

    Args:
        table: V, VII or VIII.
        training: How they are trained.
    """
    if table == "V":
        return [_trained(_VII["SaHa, k = 15"], training, title="SaHa, k = 15")]
    if table == "VIII":
        return [_trained(method, training, after=column) for column, method in _VIII.items()]
    rows = {row.name: row for row in published("VII").rows}
    return [
        _trained(method, training, after=name, labels=_labels(rows[name].labels, method, training))
        for name, method in _VII.items()
    ]


def pairs_per_step(method: str, training: Training) -> int:
    """Return how many pairs a step of a method has."""
    return training.batch_size // _PER_STEP[method]


def _trained(
    method: _Method, training: Training, *, title: str = "", after: str = "", labels: tuple[str, ...] = ()
) -> Trained:
    sampling: tuple[str, ...] = ("--num_hard_negatives", str(method.k)) if method.k else ()
    if method.method == "saha":
        sampling += ("--pool_multiplier", str(method.pool), "--variant", training.variant)
    words: tuple[str, ...] = ("--batch_size", str(pairs_per_step(method.method, training)))
    if training.max_steps is None:
        words += ("--num_epochs", f"{training.num_epochs:g}")
        warmup = training.warmup_steps
    else:
        steps = training.max_steps * _PER_STEP[method.method]
        words += ("--max_steps", str(steps))
        warmup = steps // WARMUP_SHARE if training.warmup_steps is None else training.warmup_steps
    words += ("--learning_rate", f"{training.learning_rate:g}")
    words += ("--warmup_steps", str(warmup)) if warmup is not None else ("--warmup_steps", f"{1 / WARMUP_SHARE:.3f}")
    words += ("--lora_dropout", f"{training.lora_dropout:g}", "--mask_equal_positives", "false")
    words += ("--sub_batch_size", str(training.sub_batch_size), "--resize", training.resize)
    return Trained(method.name, title, method.method, method.prompt_mode, sampling, words, labels, after)


def _labels(published_labels: tuple[str, ...], method: _Method, training: Training) -> tuple[str, ...]:
    """Return the labels of a published row of Table VII with our batch: clusters, queries or pairs, as there."""
    batch = pairs_per_step(method.method, training)
    clusters = batch // (method.k + 1) if method.method == "saha" else batch
    return (*published_labels[:3], str(clusters))
