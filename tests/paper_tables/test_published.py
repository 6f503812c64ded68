"""The published tables: figures as printed, and which printed averages do not follow from their own columns."""

import pytest

from gen2embed_mteb.evaluation.paper import TABLE_II, notes_beside
from gen2embed_mteb.mmeb.datasets import META_TASKS, MMEB
from gen2embed_mteb.paper_tables.averages import DOMAINS, deviations
from gen2embed_mteb.paper_tables.averages import META_TASKS as COUNTS
from gen2embed_mteb.paper_tables.published import NAMES, published
from gen2embed_mteb.retrieval.published import GAIN, recall_at_1, remarks
from gen2embed_mteb.sugarcrepe.groups import published_groups


def test_every_table_is_there_with_whole_rows() -> None:
    sizes = {name: (len(published(name).rows), len(published(name).keys)) for name in NAMES}
    assert sizes == {
        "II": (11, 5),
        "III": (10, 2),
        "IV": (7, 5),
        "V": (19, 7),
        "VI": (14, 11),
        "VII": (7, 4),
        "VIII": (3, 4),
        "unime-diverse": (12, 11),
        "unime-mmeb": (17, 7),
    }
    for name in NAMES:
        table = published(name)
        assert len(table.columns) == table.num_labels + len(table.keys)
        assert not table.spans or sum(count for _, count in table.spans) == len(table.columns)
        assert len({row.name for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert len(row.labels) == table.num_labels
    with pytest.raises(ValueError, match="there is no table 'IX'; known: II, III"):
        published("IX")


def test_figures_as_printed() -> None:
    assert published("III").row("sys+q:rep-ow+d:rep").figures == {"overall": 42.46, "mean_of_meta_tasks": 43.49}
    assert published("III").row("sys+q:rep-ow+d:rep").labels == ("✓", "✓", "✓", "✗")
    assert published("V").row("GME (Qwen2-VL, 2.2B)").figures["ind"] is None
    assert published("VI").row("Human").figures["swap_object.tot"] == 96.7
    assert published("VII").row("HN, k = 1").figures["hours"] == 20.7
    assert published("VIII").methods["pool-6"] == {"ind": 70.7, "ood": 61.9, "overall": 66.8}
    urban = published("unime-diverse").row("UniME stage 1+2 (Phi3.5-V)").figures
    assert (urban["urban1k.t2i"], urban["urban1k.i2t"]) == (92.7, 95.1)


def test_the_weights_are_those_of_the_benchmark() -> None:
    assert {task: sum(one.meta_task == task for one in MMEB.datasets) for task in META_TASKS} == COUNTS
    assert {"ind": sum(one.in_domain for one in MMEB.datasets), "ood": 36 - DOMAINS["ind"]} == DOMAINS


FOUR, HALVES = "the plain mean of the four meta-tasks", "the plain mean of IND and OOD"
FOUND = {
    "II": [("SigLIP", 34.8, "30.7", ""), ("MagicLens", 27.1, "27.8", FOUR), ("UniME (Phi-3.5-V)", 40.3, "37.0", FOUR)],
    "III": [],
    "IV": [("+ QD-Rein.", 39.1, "38.7", ""), ("+ D-Rein.", 40.9, "40.3", "")],
    "V": [
        ("VLM2Vec (Qwen2-VL, 2.2B)", 59.3, "60.0 to 60.1", HALVES),
        ("UniME (Phi-3.5-V, 4.2B)", 64.2, "61.3", FOUR),
        ("UniME (LLaVA-1.6, 7.6B)", 66.6, "63.6 to 63.7", FOUR),
    ],
    "VI": [],
    "VII": [("VLM2Vec, in-batch, no prompt", 59.3, "60.0", HALVES)],
    "VIII": [],
    "unime-diverse": [],
}


@pytest.mark.parametrize("name", FOUND)
def test_averages_that_do_not_follow_from_their_columns(name: str) -> None:
    found = deviations(published(name))
    assert [(one.name, one.printed, one.over_datasets, one.rule) for one in found] == FOUND[name]


def test_unimes_averages_are_over_meta_tasks_in_every_row_but_one() -> None:
    table = published("unime-mmeb")
    found = deviations(table)
    assert [one.name for one in found] == [row.name for row in table.rows if "LLaVA-OneVision" not in row.name]
    assert {one.rule for one in found} == {FOUR}
    over_datasets = {one.name: round(one.recomputed[0], 1) for one in found}
    assert over_datasets["UniME stage 1 (Phi3.5-V)"] == 37.0
    assert over_datasets["UniME stage 1+2 (Phi3.5-V)"] == 61.3
    assert over_datasets["UniME stage 1+2 (LLaVA-1.6)"] == 63.6
    siglip = next(one for one in found if one.name.startswith("SigLIP"))
    assert siglip.over_datasets == "30.7 by meta-task and 34.8 by IND and OOD"


def test_by_hand() -> None:
    """(425 + 183 + 486 + 239.6) / 36 = 37.04, and (42.5 + 18.3 + 40.5 + 59.9) / 4 = 40.3."""
    unime = deviations(published("II"))[2]
    assert unime.recomputed == (pytest.approx(1333.6 / 36),)
    assert str(unime) == (
        "UniME (Phi-3.5-V): printed as 40.3; its own columns give 37.0 over 36 datasets; the printed figure is the "
        "plain mean of the four meta-tasks"
    )
    siglip = deviations(published("II"))[0]
    assert siglip.near == (FOUR, pytest.approx(34.95))


def test_reports_say_what_a_printed_average_is() -> None:
    assert {row.label for row in TABLE_II if row.note} == {"SigLIP", "MagicLens", "UniME (Phi-3.5-V)"}
    assert notes_beside("hierarchical") == []
    (note,) = notes_beside("unime")
    assert note.startswith("paper, II: UniME (Phi-3.5-V): printed as 40.3; its own columns give 37.0 over 36 datasets")
    (note,) = notes_beside("d-rein")
    assert note.endswith("no rule was found that gives the printed figure.")


def test_the_remarks_on_unimes_figures_follow_from_the_figures() -> None:
    rows = published("unime-diverse").methods
    ours, theirs = (rows[name] for name in ("UniME stage 1+2 (Phi3.5-V)", "VLM2Vec(Phi3.5-V)"))
    gain = (ours["flickr30k.t2i"] or 0.0) - (theirs["flickr30k.t2i"] or 0.0)
    assert (
        f"+{gain:.1f} by its own figures ({ours['flickr30k.t2i']}, against VLM2Vec's {theirs['flickr30k.t2i']})" in GAIN
    )
    shown = recall_at_1()
    assert list(shown) == [name for name in rows if name.startswith(("UniME", "E5-V"))] and len(shown) == 7
    assert shown["E5-V(Phi3.5-V)"]["urban1k.i2t"] == 83.6
    assert published_groups()["UniME stage 1+2 (Phi3.5-V)"] == (90.1, 70.9, 93.3)
    assert "40.3 (37.0 over the 36), 41.6 (38.0 over the 36), 64.2 (61.3 over the 36)" in remarks()[1]
