"""Published figures, in percent as printed there: the paper's, and those of training-free methods on MMEB.

Every report shows them beside ours, each with how it was obtained (`method.py`).

The paper prints two different averages for Qwen2-VL-2B without a prompt: 13.9 in Table II, and 14.2 in Table IV.
"""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.evaluation.method import Method

_QWEN2_VL_2B = Method("Qwen2-VL-2B")


@dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper.

    Attributes:
        table: The table's Roman numeral.
        label: The row's name, with the backbone if the table has several.
        figures: The figures by column: meta-tasks, `ind`, `ood`, `overall`.
        prompt_mode: The strategy with which this row was measured; empty for other methods.
        method: How it was obtained.
    """

    table: str
    label: str
    figures: dict[str, float]
    prompt_mode: str = ""
    method: Method = _QWEN2_VL_2B

    @property
    def title(self) -> str:
        """The row's name in our tables."""
        return f"paper, {self.table}: {self.label}" if self.table else self.label


def _zero_shot(
    table: str, label: str, figures: tuple[float, ...], prompt_mode: str = "", backbone: str = "Qwen2-VL-2B"
) -> PaperRow:
    columns = ("Classification", "VQA", "Retrieval", "Grounding", "overall")
    return PaperRow(table, label, dict(zip(columns, figures, strict=True)), prompt_mode, Method(backbone))


def _tuned(label: str, figures: tuple[float, ...], prompt_mode: str = "hierarchical") -> PaperRow:
    return PaperRow("VII", label, dict(zip(("ind", "ood", "overall"), figures, strict=True)), prompt_mode)


TABLE_II = (
    _zero_shot("II", "CLIP", (42.8, 9.1, 53.0, 51.8, 37.8), backbone="CLIP"),
    _zero_shot("II", "OpenCLIP", (47.8, 10.9, 52.3, 53.3, 39.7), backbone="OpenCLIP"),
    _zero_shot("II", "SigLIP", (40.3, 8.4, 31.6, 59.5, 34.8), backbone="SigLIP"),
    _zero_shot("II", "MagicLens", (38.8, 8.3, 35.4, 26.0, 27.1), backbone="MagicLens"),
    _zero_shot("II", "E5-V (LLaVA-NeXT)", (21.8, 4.9, 11.5, 19.0, 13.3), backbone="LLaVA-NeXT"),
    _zero_shot("II", "UniME (Phi-3.5-V)", (42.5, 18.3, 40.5, 59.9, 40.3), backbone="Phi-3.5-V"),
    _zero_shot("II", "MMRet (LLaVA-1.6)", (47.2, 18.4, 56.5, 62.6, 44.0), backbone="LLaVA-1.6"),
    _zero_shot("II", "Qwen2-VL-2B, no prompt", (21.4, 8.9, 9.5, 21.2, 13.9), "none"),
    _zero_shot("II", "Gen2Embed (Phi-3.5-V)", (35.3, 20.6, 36.4, 56.6, 34.0), "hierarchical", "Phi-3.5-V"),
    _zero_shot("II", "Gen2Embed (Qwen2-VL-2B)", (48.6, 33.3, 44.1, 52.6, 43.3), "hierarchical"),
    _zero_shot("II", "Gen2Embed (Qwen2-VL-7B)", (47.7, 32.1, 43.1, 54.8, 42.6), "hierarchical", "Qwen2-VL-7B"),
)
"""Zero-shot MMEB."""

TABLE_IV = (
    _zero_shot("IV", "No-Prompt", (21.0, 8.7, 9.1, 26.1, 14.2), "none"),
    _zero_shot("IV", "System-Q", (21.6, 7.5, 13.0, 12.1, 13.8), "system-q"),
    _zero_shot("IV", "System-D", (35.8, 25.4, 20.6, 25.3, 26.7), "system-d"),
    _zero_shot("IV", "System-QD", (46.7, 31.8, 44.1, 46.7, 41.7), "system"),
    _zero_shot("IV", "+ QD-Rein.", (45.8, 30.3, 37.1, 46.7, 39.1), "qd-rein"),
    _zero_shot("IV", "+ D-Rein.", (46.2, 33.3, 41.9, 38.6, 40.9), "d-rein"),
    _zero_shot("IV", "+ Q-Rein.", (48.6, 33.3, 44.1, 52.6, 43.3), "hierarchical"),
)
"""Prompt strategies, Qwen2-VL-2B, zero-shot."""

TABLE_VII = (
    _tuned("VLM2Vec, in-batch, no prompt", (66.0, 52.6, 59.3), "none"),
    _tuned("In-batch", (68.5, 58.6, 64.1)),
    _tuned("HN, k = 1", (60.8, 51.4, 56.6)),
    _tuned("HN, k = 7", (62.6, 54.0, 58.8)),
    _tuned("HN + beta, k = 7", (67.2, 58.1, 63.1)),
    _tuned("SaHa, k = 7", (70.8, 62.0, 66.9)),
    _tuned("SaHa, k = 15", (71.2, 62.1, 67.1)),
)
"""Negative sampling strategies, Qwen2-VL-2B, fine-tuned on MMEB."""

SUGARCREPE = {
    "VladVA (Qwen2-VL-2B), prompt only": 70.3,
    "Gen2Embed (Qwen2-VL-2B), prompt only": 76.6,
    "Gen2Embed (Qwen2-VL-7B), prompt only": 77.6,
    "Gen2Embed (Qwen2-VL-2B), fine-tuned": 87.0,
    "Gen2Embed (Qwen2-VL-7B), fine-tuned": 87.5,
}
"""Table VI, SugarCrepe, average over its seven sets."""

_PLUS_SETS = ("swap_object", "swap_attribute", "replace_object", "replace_attribute", "replace_relation")


def _plus(*figures: float) -> dict[str, tuple[float, float]]:
    pairs = list(zip(figures[::2], figures[1::2], strict=True))
    return dict(zip(_PLUS_SETS, pairs, strict=True))


SUGARCREPE_PLUS = {
    "Human": _plus(100.0, 96.7, 96.7, 93.3, 100.0, 97.0, 100.0, 98.3, 100.0, 96.7),
    "VladVA (Qwen2-VL-2B), prompt only": _plus(32.7, 27.8, 30.5, 25.3, 73.6, 65.9, 46.8, 43.0, 57.6, 58.3),
    "Gen2Embed (Qwen2-VL-2B), prompt only": _plus(41.2, 31.0, 36.8, 30.2, 84.0, 81.4, 61.5, 63.8, 54.5, 54.8),
    "Gen2Embed (Qwen2-VL-7B), prompt only": _plus(44.1, 35.9, 40.8, 38.7, 83.4, 85.7, 59.5, 60.0, 58.8, 58.1),
    "Gen2Embed (Qwen2-VL-2B), fine-tuned": _plus(46.1, 38.4, 59.5, 55.4, 95.6, 96.5, 81.9, 85.5, 72.0, 64.4),
    "Gen2Embed (Qwen2-VL-7B), fine-tuned": _plus(51.0, 51.0, 73.1, 77.8, 94.2, 93.4, 82.2, 83.1, 73.1, 71.8),
}
"""Table VI, SugarCrepe++: (ITT, TOT) by set."""


_FREERET_3B, _FREERET_7B = Method("Qwen2.5-VL-3B"), Method("Qwen2.5-VL-7B")
_TOP_50_3B, _TOP_50_7B = (Method(row.backbone, forwards=51, rerank_k=50) for row in (_FREERET_3B, _FREERET_7B))


def _free(label: str, method: Method, *figures: float) -> PaperRow:
    columns = ("Classification", "VQA", "Retrieval", "Grounding", "overall")[-len(figures) :]
    return PaperRow("", label, dict(zip(columns, figures, strict=True)), method=method)


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
