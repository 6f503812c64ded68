"""The table of MMEB against the paper's counts, and choosing datasets by name."""

from collections import Counter

import pytest

from gen2embed_mteb.evaluation.paper import SUGARCREPE_PLUS, TABLE_II, TABLE_IV, TABLE_VII, TRAINING_FREE, rows_beside
from gen2embed_mteb.mmeb import MMEB, Benchmark, DatasetInfo


def test_counts_of_the_paper() -> None:
    # Table I and Table V's "#Datasets" row: 10, 10, 12, 4; 20 in-domain, 16 out-of-domain.
    assert len(MMEB.datasets) == 36
    assert Counter(dataset.meta_task for dataset in MMEB.datasets) == {
        "Classification": 10,
        "VQA": 10,
        "Retrieval": 12,
        "Grounding": 4,
    }
    in_domain = [dataset for dataset in MMEB.datasets if dataset.in_domain]
    assert len(in_domain) == 20
    # A dataset has training pairs exactly if it is in-domain; Table I's column sums to 1,068 thousand.
    assert all((dataset.train_pairs > 0) == dataset.in_domain for dataset in MMEB.datasets)
    assert sum(dataset.train_pairs for dataset in in_domain) == 1_068_000
    assert [dataset.name for dataset in MMEB.datasets if dataset.candidates_as_queries] == ["RefCOCO-Matching"]
    assert {dataset.name: dataset.train_name for dataset in MMEB.datasets if dataset.train_name} == {
        "ImageNet-1K": "ImageNet_1K"
    }


def test_select_keeps_the_order_and_takes_aliases() -> None:
    assert MMEB.select().names == MMEB.names
    assert MMEB.select(["voc2007", "ImageNet_1K"]).names == ("ImageNet-1K", "VOC2007")
    assert MMEB.select(meta_tasks=["cla", "Grounding"]).meta_tasks == ("Classification", "Grounding")
    assert MMEB.select(["MSCOCO"]).names == ("MSCOCO",)
    assert MMEB.select(["MSCOCO", "GQA"], ["vqa"]).names == ("GQA",)


@pytest.mark.parametrize(
    ("subsets", "meta_tasks", "message"),
    [
        (["ImageNet-2K"], [], "unknown dataset 'ImageNet-2K'; did you mean 'ImageNet-1K'? Known: ImageNet-1K, N24News"),
        (["zzz"], [], "unknown dataset 'zzz' Known"),
        ([], ["grouding"], "unknown meta-task 'grouding'; did you mean 'Grounding'"),
        ([], [""], "unknown meta-task ''"),
        (["GQA"], ["Retrieval"], "no dataset of MMEB is both"),
    ],
)
def test_unknown_names_say_what_is_known(subsets: list[str], meta_tasks: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        MMEB.select(subsets, meta_tasks)
    assert message in str(caught.value)


def test_records_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown meta-task 'Video'"):
        DatasetInfo("X", "Video", True, "label")
    twice = DatasetInfo("X", "VQA", True, "label")
    with pytest.raises(ValueError, match="twice"):
        Benchmark("b", "B", (twice, twice))


def test_paper_figures_are_consistent() -> None:
    # An average over 10, 10, 12 and 4 datasets follows from the meta-tasks', and one over 20 and 16 from IND and OOD,
    # up to rounding. A slip in copying would show; the rows listed are off in the paper itself.
    weights = {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "ind": 20, "ood": 16}
    off = []
    for row in TABLE_II + TABLE_IV + TABLE_VII:
        mean = sum(figure * weights.get(column, 0) for column, figure in row.figures.items()) / 36
        if abs(mean - row.figures["overall"]) > 0.11:
            off.append(row.label)
    assert off == [
        "SigLIP",
        "MagicLens",
        "UniME (Phi-3.5-V)",
        "+ QD-Rein.",
        "+ D-Rein.",
        "VLM2Vec, in-batch, no prompt",
    ]
    assert {row.prompt_mode for row in TABLE_IV} == {
        "none",
        "system-q",
        "system-d",
        "system",
        "qd-rein",
        "d-rein",
        "hierarchical",
    }
    assert all(len(figures) == 5 for figures in SUGARCREPE_PLUS.values())


def test_rows_beside_a_run() -> None:
    labels = [row.label for row in rows_beside("system")]
    assert labels[4:] == [row.label for row in TRAINING_FREE]
    assert labels[:4] == ["System-QD", "Qwen2-VL-2B, no prompt", "Gen2Embed (Qwen2-VL-2B)", "SaHa, k = 15"]
    assert len(rows_beside("unime")) == 3 + len(TRAINING_FREE)
