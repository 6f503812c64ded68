"""How a figure was obtained: the cells of tables, `results.json`, and published rows."""

from gen2embed_mteb.evaluation.method import COLUMNS, Method, Unlabelled, methods_table
from gen2embed_mteb.evaluation.paper import TABLE_II, TABLE_IV, TABLE_VII, TRAINING_FREE


def test_cells_and_json() -> None:
    plain = Method("Qwen2-VL-2B")
    assert plain.cells() == ["Qwen2-VL-2B", "1", "0", "no", "0"]
    used = (Unlabelled(3027, "MMEB-train"), Unlabelled(36000, "own queries"))
    other = Method("Qwen2-VL-2B", 11, used, transductive=True, rerank_k=10)
    assert other.cells() == ["Qwen2-VL-2B", "11", "3,027 MMEB-train + 36,000 own queries", "yes", "10"]
    assert other.sentence().startswith("backbone: Qwen2-VL-2B; forwards per query: 11; unlabelled inputs: 3,027 ")
    assert methods_table([("ours", plain)]) == [["", *COLUMNS], ["ours", *plain.cells()]]
    for method in (plain, other):
        assert Method.from_json(method.to_json()) == method


def test_published_rows_say_how_they_were_obtained() -> None:
    """FreeRet (arXiv 2509.24621) and Lens (arXiv 2609.20252)."""
    rows = {row.title: row for row in TRAINING_FREE}
    overall = {title: (row.figures["overall"], row.method.backbone, row.method.rerank_k) for title, row in rows.items()}
    assert overall == {
        "E5-V (FreeRet's run), 3B": (36.3, "Qwen2.5-VL-3B", 0),
        "E5-V (FreeRet's run), 7B": (39.8, "Qwen2.5-VL-7B", 0),
        "FreeRet, embedder, 3B": (50.7, "Qwen2.5-VL-3B", 0),
        "FreeRet, embedder, 7B": (53.7, "Qwen2.5-VL-7B", 0),
        "FreeRet, top 50 reranked, 3B": (60.3, "Qwen2.5-VL-3B", 50),
        "FreeRet, top 50 reranked, 7B": (70.7, "Qwen2.5-VL-7B", 50),
        "Lens, backbone inferred": (63.9, "Qwen2.5-VL-7B", 0),
    }
    assert {row.method.forwards for row in TRAINING_FREE} == {1, 51}
    assert rows["FreeRet, top 50 reranked, 7B"].method.forwards == 51
    assert rows["FreeRet, top 50 reranked, 3B"].figures["VQA"] == 61.2
    for row in TABLE_II + TABLE_IV + TABLE_VII:
        assert (row.method.forwards, row.method.unlabelled, row.method.rerank_k) == (1, (), 0)
    assert {row.label: row.method.backbone for row in TABLE_II}["Gen2Embed (Qwen2-VL-7B)"] == "Qwen2-VL-7B"
    assert {row.method.backbone for row in TABLE_IV + TABLE_VII} == {"Qwen2-VL-2B"}
