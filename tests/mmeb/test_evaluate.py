"""The evaluation run end to end on small data in MMEB's form: scores, reuse, resuming, bad input, reports."""

import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import COLOURS, M, colour_rows, eval_row, write_images, write_table
from PIL import Image
from plain_encoder import PlainEncoder, vector

from gen2embed_mteb.bulk.store import StoreMismatchError
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb import MMEB, Benchmark
from gen2embed_mteb.mmeb.evaluate import evaluate
from gen2embed_mteb.mmeb.report import markdown, text_table
from gen2embed_mteb.mmeb.tables import DataError
from gen2embed_mteb.storage.owned_folder import LEDGER

NAMES = list(COLOURS)


def write_data(root: Path) -> Path:
    """Three datasets: image to label, text to image (V2 columns), grounding with candidates as queries."""
    write_images(root / "img")
    write_table(root / "VOC2007" / "test-00000-of-00001.parquet", colour_rows(NAMES))
    rng = random.Random(0)
    rows = []
    for _ in range(30):
        chosen = rng.sample(NAMES, 3)
        rows.append(
            {
                "qry_inst": "Find me:",
                "qry_text": f"{chosen[0]} number {rng.randrange(10)}",
                "tgt_inst": f"{M}\nRepresent the given image.",
                "tgt_text": [f"{name} thing" for name in chosen],
                "tgt_img_path": [f"img/{name}.png" for name in chosen],
            }
        )
    write_table(root / "MSCOCO_t2i" / "test-00000-of-00001.parquet", rows)
    rows = [
        eval_row(
            f"{M}\nSelect: the {name} one\n",
            f"img/{name}.png",
            [(f"{M}\nSelect: the {other} one\n", f"img/{other}.png") for other in sorted(NAMES, key=name.__ne__)],
        )
        for name in NAMES
    ]
    write_table(root / "RefCOCO-Matching" / "test-00000-of-00001.parquet", rows)
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def settings(data: Path, output: Path, **changes: Any) -> EvaluationConfig:
    values: dict[str, Any] = {
        "data_dir": str(data),
        "output_dir": str(output),
        "fingerprint": "plain",
        "batch_size": 4,
        "subsets": ("VOC2007", "MSCOCO_t2i", "RefCOCO-Matching"),
    }
    return EvaluationConfig(**{**values, **changes})


def results(output: Path) -> dict[str, Any]:
    """`results.json` without the one figure that may differ between equal runs."""
    content: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    del content["seconds"]
    return content


def plain_hits(rows: list[tuple[np.ndarray, list[np.ndarray]]]) -> list[tuple[bool, bool]]:
    """(official, strict) of every row, by loops over exact float64 products."""
    outcome = []
    for query, candidates in rows:
        scores = [sum(float(a) * float(b) for a, b in zip(query, one, strict=True)) for one in candidates]
        outcome.append((scores.index(max(scores)) == 0, all(scores[0] > other for other in scores[1:])))
    return outcome


def test_scores_equal_a_plain_recomputation(data: Path, tmp_path: Path) -> None:
    result = evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"))
    colour = {name: Image.new("RGB", (32, 32), rgb) for name, rgb in COLOURS.items()}
    expected = {}
    rows = []
    for name in NAMES:
        query = vector("Name the colour", [colour[name]])
        rows.append((query, [vector(name, [])] + [vector(other, []) for other in NAMES if other != name]))
    expected["VOC2007"] = plain_hits(rows)
    rows, rng = [], random.Random(0)
    for _ in range(30):
        chosen = rng.sample(NAMES, 3)
        query = vector(f"Find me: {chosen[0]} number {rng.randrange(10)}", [])
        texts = [f"Represent the given image. {name} thing" for name in chosen]
        rows.append((query, [vector(text, [colour[name]]) for text, name in zip(texts, chosen, strict=True)]))
    expected["MSCOCO_t2i"] = plain_hits(rows)
    expected["RefCOCO-Matching"] = [(True, True)] * 5  # the positive repeats the query, on the same side
    for score in result.scores:
        ours = [(row.rank == 0, row.strict) for row in score.rows]
        assert ours == expected[score.dataset.name], score.dataset.name
    written = results(tmp_path / "out")
    assert 0 < written["datasets"]["MSCOCO_t2i"]["precision_at_1"] <= 1
    for name, hits in expected.items():
        assert written["datasets"][name] == {
            "precision_at_1": sum(official for official, _ in hits) / len(hits),
            "precision_at_1_strict": sum(strict for _, strict in hits) / len(hits),
            "num_queries": len(hits),
            "num_errors": 0,
        }
    figures = {name: entry["precision_at_1"] for name, entry in written["datasets"].items()}
    assert written["overall"] == pytest.approx(sum(figures.values()) / 3)
    assert written["ind"] == pytest.approx((figures["VOC2007"] + figures["MSCOCO_t2i"]) / 2)
    assert written["ood"] == figures["RefCOCO-Matching"]


def test_sides(data: Path, tmp_path: Path) -> None:
    encoder = PlainEncoder()
    evaluate(encoder, MMEB, settings(data, tmp_path / "out", subsets=("RefCOCO-Matching",)))
    assert {side for side, _, _ in encoder.given} == {"query"}  # its candidates are queries, and equal to them
    assert sum(encoder.given.values()) == 5
    encoder = PlainEncoder()
    evaluate(encoder, MMEB, settings(data, tmp_path / "other", subsets=("MSCOCO_t2i",)))
    assert {(side, bool(sizes)) for side, _, sizes in encoder.given} == {("query", False), ("document", True)}


def test_distinct_inputs_are_encoded_once_across_datasets(data: Path, tmp_path: Path) -> None:
    # The same labels and images in a second dataset: only its own instruction is new.
    shutil.copytree(data / "VOC2007", data / "SUN397")
    rows = colour_rows(NAMES)
    rows[0] = eval_row(f"{M}\nNew\n", "img/red.png", list(zip(NAMES, [""] * 5, strict=True)))
    write_table(data / "Place365" / "test-0.parquet", rows)
    encoder = PlainEncoder()
    evaluate(encoder, MMEB, settings(data, tmp_path / "out", subsets=("VOC2007", "SUN397", "Place365")))
    assert encoder.given == {
        ("query", f"{M}\nName the colour\n", ((32, 32),)): 5,
        ("query", f"{M}\nNew\n", ((32, 32),)): 1,
        **{("document", name, ()): 1 for name in NAMES},
    }


def test_ties_official_and_strict(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Collapsed(PlainEncoder):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            return np.tile(np.float32([0.6, 0.8]), (len(inputs), 1))

    write_table(
        data / "GQA" / "test-0.parquet",
        [eval_row("q", "", [("yes", ""), ("yes", "")]), eval_row("q", "", [("yes", ""), ("no", ""), ("yes", "")])],
    )
    evaluate(Collapsed(), MMEB, settings(data, tmp_path / "out", subsets=("GQA", "VOC2007")))
    datasets = results(tmp_path / "out")["datasets"]
    assert datasets["VOC2007"]["precision_at_1"] == 1.0
    assert datasets["VOC2007"]["precision_at_1_strict"] == 0.0
    # A positive that is listed twice ties with itself only: the first row is no tie.
    assert datasets["GQA"]["precision_at_1_strict"] == 0.5
    assert "VOC2007: 5 of 5 rows are hits only because a tie counts" in caplog.text


def test_zipped_equals_unpacked(data: Path, tmp_path: Path) -> None:
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "a"))
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        for path in sorted((data / "img").iterdir()):
            archive.write(path, f"img/{path.name}")
    shutil.rmtree(data / "img")
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "b"))  # found beside the tables
    (data / "images.zip").rename(tmp_path / "moved.zip")
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "c", image_dir=str(tmp_path / "moved.zip")))
    moved = results(tmp_path / "c")
    assert moved["settings"].pop("image_dir") == str(tmp_path / "moved.zip")
    moved["settings"]["image_dir"] = ""
    assert results(tmp_path / "a") == results(tmp_path / "b") == moved
    with pytest.raises(FileNotFoundError, match="no such folder"):
        evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "d", image_dir=str(tmp_path / "none")))


@pytest.mark.slow
def test_killed_at_random_it_ends_in_the_same_bytes(data: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "helpers" / "run_evaluation.py"

    def start(output: Path, delay: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, script, str(data), str(output), str(delay)], stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole", 0.0).wait(60) == 0
    rng, kills = random.Random(1), 0
    embeddings = tmp_path / "killed" / "embeddings"
    for _ in range(6):
        process = start(tmp_path / "killed", 0.05)
        while not embeddings.is_dir() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 1.2))  # the whole work takes more than two seconds
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2
    assert start(tmp_path / "killed", 0.0).wait(60) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    for path in sorted((tmp_path / "whole").rglob("*")):
        if path.is_file() and path.name not in (
            "results.json",
            "leaderboard.json",
            LEDGER,
        ):  # they hold times, or their digest
            twin = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
            assert twin.read_bytes() == path.read_bytes(), path.name


def test_interrupted_at_every_batch_it_ends_in_the_same_bytes(data: Path, tmp_path: Path) -> None:
    class Interrupted(PlainEncoder):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.calls = calls

        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            self.calls -= 1
            if self.calls < 0:
                raise KeyboardInterrupt
            return super()._encode(side, inputs)

    whole = PlainEncoder()
    evaluate(whole, MMEB, settings(data, tmp_path / "whole", batch_size=1))
    total = sum(whole.given.values())
    for stop in (1, 5, 6, 17, 18, 30, total - 1):
        output = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(Interrupted(stop), MMEB, settings(data, output, batch_size=1))
        resumed = PlainEncoder()
        evaluate(resumed, MMEB, settings(data, output, batch_size=1))
        # At most the batches of one shard are made again.
        assert stop - 16 <= total - sum(resumed.given.values()) <= stop
        assert results(output) == results(tmp_path / "whole")
        for path in (tmp_path / "whole" / "embeddings").iterdir():
            assert (output / "embeddings" / path.name).read_bytes() == path.read_bytes()


def test_another_models_embeddings_are_refused(data: Path, tmp_path: Path) -> None:
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out"))
    before = (tmp_path / "out" / "results.json").read_bytes()
    for change in ({"fingerprint": "other"}, {"resize": "official"}, {"min_side": 56}):
        with pytest.raises(StoreMismatchError, match="--overwrite"):
            evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", **change))
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    encoder = PlainEncoder()
    evaluate(encoder, MMEB, settings(data, tmp_path / "out", fingerprint="other", overwrite=True))
    assert sum(encoder.given.values()) > 0
    assert results(tmp_path / "out")["fingerprint"] == "other"


def test_missing_columns_of_any_dataset_stop_the_run_before_it_begins(data: Path, tmp_path: Path) -> None:
    row = eval_row("q", "", [("a", "")])
    del row["tgt_text"]
    write_table(data / "RefCOCO-Matching" / "test-00000-of-00001.parquet", [row])
    encoder = PlainEncoder()
    with pytest.raises(DataError, match=r"RefCOCO-Matching.*no column tgt_text"):
        evaluate(encoder, MMEB, settings(data, tmp_path / "out"))
    assert not encoder.given
    assert not (tmp_path / "out").exists()


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def bomb(path: Path) -> None:
    Image.new("1", (9500, 9500)).save(path)


BAD_IMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("img/none.png", lambda path: None, "not found in"),
    "truncated": ("img/bad.png", truncated, "damaged"),
    "bomb": ("img/bad.png", bomb, "exceed"),
    "parent": ("../secret.png", lambda path: Image.new("RGB", (9, 9)).save(path), "outside of"),
    "absolute": ("/etc/hostname", lambda path: None, "outside of"),
    "link": ("img/bad.png", lambda path: path.symlink_to("/etc/hostname"), "outside of"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", ["query", "candidate"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_set_their_row_aside(data: Path, tmp_path: Path, kind: str, side: str) -> None:
    path, make, reason = BAD_IMAGES[kind]
    if not path.startswith("/"):
        make(data / path)
    good = eval_row(f"{M}\nFind\n", "img/red.png", [("r", "img/red.png"), ("b", "img/blue.png")])
    bad = eval_row(f"{M}\nFind\n", path, [("r", "img/red.png"), ("b", "img/blue.png")])
    if side == "candidate":
        bad = eval_row(f"{M}\nFind\n", "img/red.png", [("r", "img/red.png"), ("b", path)])
    write_table(data / "OVEN" / "test-0.parquet", [good, bad, good])
    result = evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", subsets=("OVEN",)))
    (line,) = (tmp_path / "out" / "errors.jsonl").read_text(encoding="utf-8").splitlines()
    error = json.loads(line)
    assert (error["dataset"], error["row"], error["file"]) == ("OVEN", 1, path)
    assert reason in error["reason"]
    entry = results(tmp_path / "out")["datasets"]["OVEN"]
    assert (entry["num_queries"], entry["num_errors"]) == (2, 1)
    assert result.too_many_errors
    assert result.error_rate == pytest.approx(1 / 3)


ODD_IMAGES: dict[str, Callable[[Path], None]] = {
    "grayscale": lambda path: Image.new("L", (40, 40), 9).save(path, "PNG"),
    "rgba": lambda path: Image.new("RGBA", (40, 40), (1, 2, 3, 4)).save(path, "PNG"),
    "palette": lambda path: Image.new("P", (40, 40), 3).save(path, "PNG"),
    "1x1": lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"),
    "cmyk": lambda path: Image.new("CMYK", (40, 40)).save(path, "JPEG"),
    "animated": lambda path: Image.new("RGB", (40, 40)).save(
        path, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 40), "red")]
    ),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_are_scored(data: Path, tmp_path: Path, kind: str) -> None:
    ODD_IMAGES[kind](data / "img" / "odd")
    row = eval_row(f"{M}\nFind\n", "img/odd", [("Find", "img/odd"), ("other", "img/blue.png")])
    write_table(data / "OVEN" / "test-0.parquet", [row])
    encoder = PlainEncoder()
    result = evaluate(encoder, MMEB, settings(data, tmp_path / "out", subsets=("OVEN",)))
    assert results(tmp_path / "out")["datasets"]["OVEN"] == {
        "precision_at_1": 1.0,
        "precision_at_1_strict": 1.0,
        "num_queries": 1,
        "num_errors": 0,
    }
    assert not result.too_many_errors
    assert min(side for _, _, sizes in encoder.given for size in sizes for side in size) >= 28


@pytest.mark.parametrize(("rate", "failed"), [(0.001, True), (0.1, True), (0.5, False)])
def test_error_rate(data: Path, tmp_path: Path, rate: float, failed: bool) -> None:
    rows = colour_rows(NAMES)
    rows[1]["tgt_text"], rows[1]["tgt_img_path"] = [], []
    write_table(data / "VOC2007" / "test-00000-of-00001.parquet", rows)
    result = evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", subsets=("VOC2007",), max_error_rate=rate))
    assert result.too_many_errors is failed
    assert result.errors[0].reason == "the candidate list is empty"
    assert results(tmp_path / "out")["datasets"]["VOC2007"]["num_queries"] == 4  # written all the same


def test_a_dataset_without_a_usable_row(data: Path, tmp_path: Path) -> None:
    write_table(data / "GQA" / "test-0.parquet", [eval_row("q", "img/none.png", [("a", "")])])
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", subsets=("GQA", "VOC2007")))
    written = results(tmp_path / "out")
    assert written["datasets"]["GQA"]["precision_at_1"] is None
    assert written["ood"] is None
    assert written["overall"] == written["datasets"]["VOC2007"]["precision_at_1"]


def test_limit_and_meta_task(data: Path, tmp_path: Path) -> None:
    for name in ("MSCOCO", "RefCOCO", "Visual7W-Pointing"):
        write_table(data / name / "test-0.parquet", colour_rows(NAMES))
    evaluate(PlainEncoder(), MMEB, settings(data, tmp_path / "out", subsets=(), meta_tasks=("gro",), limit=2))
    datasets = results(tmp_path / "out")["datasets"]
    assert list(datasets) == ["MSCOCO", "Visual7W-Pointing", "RefCOCO", "RefCOCO-Matching"]
    assert all(entry["num_queries"] == 2 for entry in datasets.values())


def test_reports(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "out", model_name="my/model", revision="abc", leaderboard={"url": "https://x"})
    started = time.time()
    result = evaluate(PlainEncoder(), MMEB, config)
    content = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(content) == [
        "model",
        "revision",
        "prompt_mode",
        "benchmark",
        "method",
        "settings",
        "datasets",
        "meta_tasks",
        "ind",
        "ood",
        "overall",
        "fingerprint",
        "versions",
        "seconds",
    ]
    assert (content["model"], content["revision"], content["benchmark"]) == ("my/model", "abc", "mmeb")
    assert 0 <= content["seconds"] <= time.time() - started + 0.001
    assert content["versions"]["numpy"] == np.__version__
    assert content["meta_tasks"]["Grounding"] == {
        "precision_at_1": 1.0,
        "precision_at_1_strict": 1.0,
        "num_datasets": 1,
    }
    score = json.loads((tmp_path / "out" / "RefCOCO-Matching_score.json").read_text(encoding="utf-8"))
    assert score == {"acc": 1.0, "num_correct": 5, "num_pred": 5}
    board = json.loads((tmp_path / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    assert board["metadata"]["model_name"] == "my/model"
    assert board["metadata"]["url"] == "https://x"
    assert board["metrics"]["image"]["RefCOCO-Matching"]["hit@1"] == 1.0
    assert board["metrics"]["image"]["VOC2007"]["num_pred"] == 5
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert table == markdown(result, config)
    assert "| RefCOCO-Matching | Grounding | OOD | 100.0 | 100.0 | 5 | 0 |" in table
    # Classification, Retrieval, Grounding, IND, OOD, Overall, as the paper prints them.
    how = "Qwen2-VL-2B | 1 | 0 | no | 0 |"
    assert f"| paper, IV: + Q-Rein. | 48.6 | 44.1 | 52.6 | – | – | 43.3 | {how}" in table
    assert f"| paper, VII: SaHa, k = 15 | – | – | – | 71.2 | 62.1 | 67.1 | {how}" in table
    assert (
        "| FreeRet, top 50 reranked, 7B | 69.4 | 69.9 | 78.2 | – | – | 70.7 | Qwen2.5-VL-7B | 51 | 0 | no | 50 |"
        in table
    )
    assert "| Overall | backbone | forwards per query | unlabelled inputs | transductive | rerank k |" in table
    assert max(len(line) for line in text_table(result, config).splitlines()) <= 120


def test_mini_benchmark_plugs_in(data: Path, tmp_path: Path) -> None:
    mini = Benchmark("mmeb-mini", "MMEB-mini", MMEB.select(["VOC2007"]).datasets)
    config = settings(data, tmp_path / "out", subsets=())
    assert "of MMEB itself" in markdown(evaluate(PlainEncoder(), mini, config), config)
    assert results(tmp_path / "out")["benchmark"] == "mmeb-mini"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"min_side": -1}, "min_side is -1"),
        ({"max_error_rate": 2}, "max_error_rate is 2"),
        ({"resize": "big"}, "resize is 'big'; known: processor"),
        ({"data_dir": ""}, "data_dir is empty"),
        ({"fingerprint": ""}, "fingerprint is empty"),
    ],
)
def test_settings_are_checked_at_once(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **change)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["last", "phrase"])
def test_every_dataset_is_scored_with_its_own_prompts(data: Path, tmp_path: Path, tiny: Any, pooling: str) -> None:
    """The colours are candidates of two datasets: each has the vectors of its own prompts, also when it is resumed."""
    from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder

    write_table(data / "SUN397" / "test-00000-of-00001.parquet", colour_rows(NAMES))  # the same rows as VOC2007
    model = tiny("qwen2_vl", prompt_mode="lens", pooling=pooling)
    chosen = ("VOC2007", "SUN397", "RefCOCO-Matching")
    config = settings(data, tmp_path / "out", subsets=chosen)
    result = evaluate(PrefixEncoder(model), MMEB, config)
    pictures = {name: Image.new("RGB", (32, 32), rgb) for name, rgb in COLOURS.items()}

    def ranks(dataset: str, texts: tuple[str, ...], side: str) -> list[int]:
        name = {"prompt_name": f"{dataset}:query"}
        queries = model.encode_query([{"text": texts[0].format(one), "image": pictures[one]} for one in NAMES], **name)
        candidates = queries if side == "query" else model.encode_document(NAMES, prompt_name=f"{dataset}:document")
        scores = queries @ candidates.T
        return [int((row > row[place]).sum()) for place, row in enumerate(scores)]

    expected = {
        "VOC2007": ranks("VOC2007", (f"{M}\nName the colour\n",), "document"),
        "SUN397": ranks("SUN397", (f"{M}\nName the colour\n",), "document"),
        "RefCOCO-Matching": ranks("RefCOCO-Matching", (f"{M}\nSelect: the {{}} one\n",), "query"),
    }
    assert {score.dataset.name: [row.rank for row in score.rows] for score in result.scores} == expected
    alone = evaluate(PrefixEncoder(model), MMEB, settings(data, tmp_path / "alone", subsets=("SUN397",)))
    assert [row.rank for row in alone.scores[0].rows] == expected["SUN397"]
    again = evaluate(model, MMEB, settings(data, tmp_path / "model", subsets=chosen))  # the model itself, not in stages
    assert {score.dataset.name: [row.rank for row in score.rows] for score in again.scores} == expected
    before = results(tmp_path / "out")
    evaluate(PrefixEncoder(model), MMEB, config)
    assert results(tmp_path / "out") == before


def test_a_model_of_text_alone_is_refused_before_anything_is_encoded(data: Path, tmp_path: Path) -> None:
    write_table(data / "CIRR" / "test-00000-of-00001.parquet", [eval_row("a\n", "", [("b", ""), ("c", "")])])
    encoder = PlainEncoder(text_alone="words takes text alone")
    config = settings(data, tmp_path / "out", subsets=("CIRR", "VOC2007", "MSCOCO_t2i"))
    with pytest.raises(
        Gen2EmbedError, match=r"words takes text alone, and .* in VOC2007, MSCOCO_t2i: .*--subsets CIRR$"
    ):
        evaluate(encoder, MMEB, config)
    assert not encoder.given
    assert not (tmp_path / "out").exists()
    result = evaluate(encoder, MMEB, settings(data, tmp_path / "out", subsets=("CIRR",)))
    assert result.num_scored == 1
