"""SugarCrepe and SugarCrepe++ on small data in the originals' JSON form, scored by hand and end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.paper import SUGARCREPE
from gen2embed_mteb.mmeb.tables import DataError
from gen2embed_mteb.sugarcrepe.evaluate import (
    CAPTION_PREFIX,
    SUGARCREPE_BENCHMARK,
    SUGARCREPE_PLUS_BENCHMARK,
    evaluate_captions,
    text_table,
)
from gen2embed_mteb.sugarcrepe.scoring import score_record

RECORDS = [
    {"filename": "red.png", "caption": "a red thing", "negative_caption": "a blue thing"},
    {"filename": "blue.png", "caption": "a blue thing", "negative_caption": "a red thing"},
    {"filename": "green.png", "caption": "a green thing", "negative_caption": "thing a green"},
]


class Script(PlainEncoder):
    """Gives every input the vector written for it: captions by their words, images by their colour."""

    def __init__(self, vectors: dict[str, tuple[float, ...]]) -> None:
        super().__init__()
        self.vectors = vectors

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        super()._encode(side, inputs)
        rows = []
        for entry in inputs:
            key = entry["text"] if "text" in entry else "#{:02x}{:02x}{:02x}".format(*entry["image"].getpixel((0, 0)))
            row = np.array(self.vectors[key.removeprefix(CAPTION_PREFIX)], dtype=np.float32)
            rows.append(row / np.linalg.norm(row))
        return np.stack(rows)


def settings(folder: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "data_dir": str(folder / "json"),
        "image_dir": str(folder / "val2017"),
        "output_dir": str(folder / "out"),
        "fingerprint": "plain",
    }
    return EvaluationConfig(**{**values, **changes})


def write_json(path: Path, records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """SugarCrepe as it is shipped: dicts by running number; every set holds the same three records."""
    write_images(tmp_path / "val2017")
    for name in SUGARCREPE_BENCHMARK.sets:
        write_json(tmp_path / "json" / f"{name}.json", {str(n): record for n, record in enumerate(RECORDS)})
    return tmp_path


VECTORS = {
    "#ff0000": (1.0, 0.0, 0.0),
    "#0000ff": (0.0, 0.0, 1.0),
    "#00ff00": (0.0, 1.0, 0.0),
    "a red thing": (0.9, 0.3, 0.1),
    "a blue thing": (0.9, 0.2, 0.5),  # nearer to the red image than to the blue one, yet the blue image prefers it
    "a green thing": (0.0, 0.6, 0.8),
    "thing a green": (0.0, 0.6, 0.8),  # a tie
}


def test_sugarcrepe_by_hand(folder: Path) -> None:
    encoder = Script(VECTORS)
    result = evaluate_captions(encoder, SUGARCREPE_BENCHMARK, settings(folder, model_name="m"))
    content = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    # red: .94 against .86; blue: .48 against .10; green: equal, and a tie is wrong by the official rule.
    assert content["datasets"]["swap_att"] == {
        "accuracy_itt": pytest.approx(2 / 3),
        "accuracy_itt_ties_right": 1.0,
        "num_queries": 3,
        "num_errors": 0,
    }
    assert list(content["datasets"]) == list(SUGARCREPE_BENCHMARK.sets)
    assert content["overall"] == {"accuracy_itt": pytest.approx(2 / 3)}
    assert content["benchmark"] == "sugarcrepe"
    # Captions are queries with the prefix, images are candidates without text; each once over all seven sets.
    assert encoder.given == {
        **{("query", CAPTION_PREFIX + caption, ()): 1 for caption in VECTORS if not caption.startswith("#")},
        ("document", "", ((32, 32),)): 3,
    }
    assert not result.too_many_errors
    assert content["method"]["forwards_per_query"] == 1 and not content["method"]["transductive"]
    printed = text_table(result, settings(folder, model_name="m")).splitlines()
    assert any(line.startswith("Ours: backbone: m; forwards per query: 1; unlabelled inputs: 0") for line in printed)
    assert max(map(len, printed)) <= 100
    assert any(line.split() == ["Avg.", "66.7", *(f"{mean:.1f}" for mean in SUGARCREPE.values())] for line in printed)
    number = 1 + list(SUGARCREPE).index("Gen2Embed (Qwen2-VL-2B), prompt only")
    assert f"[{number}] paper, VI: Gen2Embed (Qwen2-VL-2B), prompt only" in printed
    assert "| ours | 66.7 | 66.7 |" in (folder / "out" / "results.md").read_text(encoding="utf-8")


def test_cut_vectors_by_hand(folder: Path) -> None:
    evaluate_captions(Script(VECTORS), SUGARCREPE_BENCHMARK, settings(folder, truncate_dim=2))
    content = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    # red: .949 against .976, wrong now; blue: its picture is 0 in two dimensions, a tie; green: a tie as before.
    assert content["datasets"]["swap_att"]["accuracy_itt"] == 0
    assert content["datasets"]["swap_att"]["accuracy_itt_ties_right"] == pytest.approx(2 / 3)
    assert content["settings"]["truncate_dim"] == 2


def unit(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32) / np.float32(np.linalg.norm(values))


def test_plus_records_by_hand() -> None:
    image, near, nearer, far = unit(1, 0, 0), unit(0.8, 0.6, 0), unit(0.9, 0.3, 0.1), unit(0, 0, 1)
    right, wrong, tied = (True, False), (False, False), (False, True)
    assert score_record(image, np.stack([near, nearer, far])) == [right, right]
    # ITT needs both captions; one behind the negative is enough to be wrong. TOT does not look at the image.
    assert score_record(far, np.stack([near, nearer, unit(0, 0.2, 1)])) == [wrong, right]
    assert score_record(image, np.stack([nearer, far, near])) == [wrong, wrong]
    # The negative repeats a caption: ITT ties, and so does TOT, as sim(c1, c2) = sim(c1, n).
    assert score_record(image, np.stack([near, near, near])) == [tied, tied]
    assert score_record(image, np.stack([nearer, near, near])) == [tied, wrong]


def test_plus_against_the_definition() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        image, first, second, negative = (unit(*row) for row in rng.normal(size=(4, 3)))
        itt = min(image @ first, image @ second) > image @ negative
        tot = first @ second > max(first @ negative, second @ negative)
        outcome = score_record(image, np.stack([first, second, negative]))
        assert [hit for hit, _ in outcome] == [itt, tot]
        seen.add((bool(itt), bool(tot)))
    assert len(seen) == 4


@pytest.mark.parametrize("stems", ["files", "names"])
def test_plus_end_to_end(tmp_path: Path, stems: str) -> None:
    write_images(tmp_path / "val2017")
    plus = [{"id": n, **record, "caption2": f"{record['caption']} here"} for n, record in enumerate(RECORDS)]
    for name, file in SUGARCREPE_PLUS_BENCHMARK.sets.items():
        # A list, in a folder `data` as in the original repository; also under the paper's longer names.
        write_json(tmp_path / "json" / "data" / f"{file if stems == 'files' else name}.json", plus)
    vectors = {**VECTORS, "a red thing here": (0.9, 0.4, 0.1), "a blue thing here": (0.0, 0.1, 0.9)}
    vectors["a green thing here"] = (0.0, 0.8, 0.6)
    result = evaluate_captions(Script(vectors), SUGARCREPE_PLUS_BENCHMARK, settings(tmp_path, subsets=("swap_object",)))
    (score,) = result.scores
    # ITT: red right (.94, .91 > .86), blue right, green tied. TOT: red right (.994 > .90, .92);
    # blue: sim(c1, c2) = .50 < sim(c1, n) = .91; green: sim(c1, c2) = .96 < sim(c1, n) = 1.
    assert score.hits == {"itt": [True, True, False], "tot": [True, False, False]}
    assert score.ties == {"itt": [False, False, True], "tot": [False, False, False]}
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert content["datasets"]["swap_object"]["accuracy_itt"] == pytest.approx(2 / 3)
    assert content["overall"] == {"accuracy_itt": pytest.approx(2 / 3), "accuracy_tot": pytest.approx(1 / 3)}
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "| ours | 66.7 | 33.3 | 66.7 | 33.3 |" in table
    assert "| paper, VI: Gen2Embed (Qwen2-VL-2B), prompt only | 41.2 | 31.0 | – | – |" in table


def test_a_collapsed_model_scores_nothing_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = evaluate_captions(
        Script(dict.fromkeys(VECTORS, (1.0, 2.0, 3.0))), SUGARCREPE_BENCHMARK, settings(folder, subsets=("add_obj",))
    )
    assert result.overall("itt") == 0.0
    assert result.scores[0].accuracy("itt", ties_count=True) == 1.0
    assert "add_obj, ITT: 3 of 3 records are ties, which count as wrong" in caplog.text


def test_bad_records_are_set_aside(folder: Path) -> None:
    bad = [
        RECORDS[0],
        {**RECORDS[1], "filename": "none.png"},
        {**RECORDS[1], "filename": "../json/add_obj.json"},
        {**RECORDS[1], "negative_caption": None},
        {"filename": "red.png"},
        "no record",
    ]
    write_json(folder / "json" / "add_obj.json", bad)
    result = evaluate_captions(Script(VECTORS), SUGARCREPE_BENCHMARK, settings(folder, subsets=("add_obj",)))
    lines = (folder / "out" / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    errors = [json.loads(line) for line in lines]
    assert [error["row"] for error in errors] == [1, 2, 3, 4, 5]
    assert errors[0]["file"] == "none.png"
    assert "outside of" in errors[1]["reason"]
    assert errors[2]["reason"] == "negative_caption is missing, empty or not a string"
    assert errors[2]["file"] == str(folder / "json" / "add_obj.json")
    assert result.num_scored == 1
    assert result.too_many_errors


def test_what_cannot_be_used_at_all(folder: Path) -> None:
    config = settings(folder, subsets=("add_obj",))
    path = folder / "json" / "add_obj.json"
    encoder = Script(VECTORS)
    for content, message in (
        ([{"filename": "a", "caption": "b"}], "no field negative_caption; it has caption, filename"),
        ([], "it has no records"),
        ("text", "expected a list or a dict"),
    ):
        write_json(path, content)
        with pytest.raises(DataError, match=message):
            evaluate_captions(encoder, SUGARCREPE_BENCHMARK, config)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not readable as JSON"):
        evaluate_captions(encoder, SUGARCREPE_BENCHMARK, config)
    path.unlink()
    with pytest.raises(DataError, match=r"no add_obj\.json"):
        evaluate_captions(encoder, SUGARCREPE_BENCHMARK, config)
    with pytest.raises(ValueError, match="unknown set 'add_rel'"):
        evaluate_captions(encoder, SUGARCREPE_BENCHMARK, settings(folder, subsets=("add_rel",)))
    with pytest.raises(ValueError, match="has no meta-tasks"):
        evaluate_captions(encoder, SUGARCREPE_BENCHMARK, settings(folder, meta_tasks=("VQA",)))
    assert not encoder.given


def test_resumes_and_refuses_like_mmeb(folder: Path) -> None:
    evaluate_captions(Script(VECTORS), SUGARCREPE_BENCHMARK, settings(folder))
    again = Script(VECTORS)
    evaluate_captions(again, SUGARCREPE_BENCHMARK, settings(folder))
    assert not again.given
    with pytest.raises(StoreMismatchError, match="fingerprint is 'plain' there and 'other' now"):
        evaluate_captions(again, SUGARCREPE_BENCHMARK, settings(folder, fingerprint="other"))
    with pytest.raises(StoreMismatchError, match="limit is None there and 2 now"):
        evaluate_captions(again, SUGARCREPE_BENCHMARK, settings(folder, limit=2))
    limited = evaluate_captions(Script(VECTORS), SUGARCREPE_BENCHMARK, settings(folder, limit=2, overwrite=True))
    assert limited.num_scored == 14


def test_a_model_of_text_alone_is_refused_before_anything_is_encoded(folder: Path) -> None:
    encoder = PlainEncoder(text_alone="words takes text alone")
    with pytest.raises(
        Gen2EmbedError, match=r"words takes text alone, and there are images in replace_obj, .* add_att: use"
    ):
        evaluate_captions(encoder, SUGARCREPE_BENCHMARK, settings(folder))
    assert not encoder.given
    assert not (folder / "out").exists()
