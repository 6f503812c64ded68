"""Published figures, in percent as printed there: the paper's, and those of training-free methods on MMEB.

Every report shows them beside ours, each with how it was obtained (`method.py`). Those of the paper come from
`paper_tables`, which has all of its tables.

The paper prints two different averages for Qwen2-VL-2B without a prompt: 13.9 in Table II, and 14.2 in Table IV. Some
printed averages do not follow from their own columns; reports say so where they show one (`notes_beside`).
"""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.evaluation.method import Method
from gen2embed_mteb.paper_tables.averages import deviations
from gen2embed_mteb.paper_tables.published import published


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper.

    Attributes:
        table: The table's Roman numeral.
        label: The row's name, with the backbone if the table has several.
        figures: The figures by column: meta-tasks, `ind`, `ood`, `overall`.
        prompt_mode: The strategy with which this row was measured; empty for other methods.
        method: How it was obtained.
        note: What is wrong with its average, as a sentence without its end; empty if nothing is.
    """

    table: str
    label: str
    figures: dict[str, float]
    prompt_mode: str
    method: Method
    note: str = ""

    @property
    def title(self) -> str:
        """The row's name in our tables."""
        return f"paper, {self.table}: {self.label}" if self.table else self.label


def _rows(table: str) -> tuple[PaperRow, ...]:
    """Return the rows of a published table, each with what is wrong with its average, if something is."""
    found = published(table)
    notes = {deviation.name: str(deviation) for deviation in deviations(found)}
    return tuple(
        PaperRow(
            table,
            row.name,
            {name: figure for name, figure in row.figures.items() if name != "hours" and figure is not None},
            row.prompt_mode,
            Method(row.backbone),
            notes.get(row.name, ""),
        )
        for row in found.rows
    )


TABLE_II = _rows("II")
"""Zero-shot MMEB."""

TABLE_IV = _rows("IV")
"""Prompt strategies, Qwen2-VL-2B, zero-shot."""

TABLE_VII = _rows("VII")
"""Negative sampling strategies, Qwen2-VL-2B, fine-tuned on MMEB."""

_CAPTION_ROWS = (
    "Human",
    "VladVA (Qwen2-VL-2B), prompt only",
    "Gen2Embed (Qwen2-VL-2B), prompt only",
    "Gen2Embed (Qwen2-VL-7B), prompt only",
    "Gen2Embed (Qwen2-VL-2B), fine-tuned",
    "Gen2Embed (Qwen2-VL-7B), fine-tuned",
)
"""The rows of Table VI that reports show; `gen2embed table VI` shows all of them."""

_CAPTIONS = {name: published("VI").row(name).figures for name in _CAPTION_ROWS}

SUGARCREPE = {name: figures["sugarcrepe"] or 0.0 for name, figures in _CAPTIONS.items() if name != "Human"}
"""Table VI, SugarCrepe, average over its seven sets."""

_PLUS_SETS = ("swap_object", "swap_attribute", "replace_object", "replace_attribute", "replace_relation")

SUGARCREPE_PLUS = {
    name: {one: (figures[f"{one}.itt"] or 0.0, figures[f"{one}.tot"] or 0.0) for one in _PLUS_SETS}
    for name, figures in _CAPTIONS.items()
}
"""Table VI, SugarCrepe++: (ITT, TOT) by set."""


_FREERET_3B, _FREERET_7B = Method("Qwen2.5-VL-3B"), Method("Qwen2.5-VL-7B")
_TOP_50_3B, _TOP_50_7B = (Method(row.backbone, forwards=51, rerank_k=50) for row in (_FREERET_3B, _FREERET_7B))


def _free(label: str, method: Method, *figures: float) -> PaperRow:
    columns = ("Classification", "VQA", "Retrieval", "Grounding", "overall")[-len(figures) :]
    return PaperRow("", label, dict(zip(columns, figures, strict=True)), "", method)


TRAINING_FREE = (
    _free("E5-V (FreeRet's run), 3B", _FREERET_3B, 39.9, 30.4, 36.6, 41.3, 36.3),
    _free("E5-V (FreeRet's run), 7B", _FREERET_7B, 41.2, 37.2, 37.9, 48.4, 39.8),
    _free("FreeRet, embedder, 3B", _FREERET_3B, 50.7),
    _free("FreeRet, embedder, 7B", _FREERET_7B, 53.7),
    _free("FreeRet, top 50 reranked, 3B", _TOP_50_3B, 57.5, 61.2, 62.8, 57.8, 60.3),
    _free("FreeRet, top 50 reranked, 7B", _TOP_50_7B, 69.4, 70.0, 69.9, 78.2, 70.7),
    _free("Lens, backbone inferred", _FREERET_7B, 63.9),
)
"""MMEB's 36 datasets without training: FreeRet (arXiv 2509.24621), which also ran E5-V, and Lens (arXiv 2609.20252),
whose abstract does not name the backbone."""


def rows_beside(prompt_mode: str) -> tuple[PaperRow, ...]:
    """Return the rows of the paper to print beside a run on MMEB or a benchmark of its form.

    Args:
        prompt_mode: The run's strategy.

    Returns:
        The paper's row for the same strategy (Table IV) if there is one, its model without and with the hierarchical
        prompt (Table II, Qwen2-VL-2B), its fine-tuned model (Table VII, SaHa, k = 15), and training-free methods.
    """
    same = tuple(row for row in TABLE_IV if row.prompt_mode == prompt_mode)
    anchors = tuple(row for row in TABLE_II if "Qwen2-VL-2B" in row.label)
    return same + anchors + (TABLE_VII[-1],) + TRAINING_FREE


def notes_beside(prompt_mode: str) -> list[str]:
    """Return what must be said about the published averages that a run is compared with, sentence by sentence.

    Args:
        prompt_mode: The run's strategy.

    Returns:
        A sentence for each row of `rows_beside` whose average does not follow from its own columns, and, for a run with
        UniME's prompts, for UniME's figure in the paper.
    """
    rows = [row for row in rows_beside(prompt_mode) if row.note]
    if prompt_mode in _UNIME_PROMPTS:
        rows += [row for row in TABLE_II if row.note and row.label.startswith("UniME")]
    return [f"paper, {row.table}: {row.note}." for row in rows]


_UNIME_PROMPTS = ("unime", "unime-readme")
