"""MMEB-mini: MMEB's form to the letter, the same bytes for the same seed, and truths that can be counted."""

import hashlib
import json
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from samples import sample_of

from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mini.digits import test_digits as digits_for_evaluation
from gen2embed_mteb.mini.digits import train_digits
from gen2embed_mteb.mmeb.readers import EvalRow, TrainRow, read_eval_rows, read_train_rows
from gen2embed_mteb.mmeb.tables import open_subset

pytestmark = pytest.mark.slow

IN_DOMAIN = [dataset for dataset in MMEB_MINI.datasets if dataset.in_domain]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Smaller than what users get, of which `whole` is drawn."""
    base = tmp_path_factory.mktemp("mmeb-mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", 40)
        for part in ("eval", "crepe"):
            benchmark.ensure(part, base)
    return base


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What users get."""
    base = tmp_path_factory.mktemp("whole")
    benchmark.ensure("eval", base)
    return base


@pytest.fixture(scope="module")
def trained_on(root):
    """The same with the training pairs, which take most of the time to draw."""
    return benchmark.ensure("train", root)


def digest(folder):
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def test_it_has_twelve_datasets_or_more_over_four_meta_tasks_in_and_out_of_domain():
    assert len(MMEB_MINI.datasets) >= 12
    assert MMEB_MINI.meta_tasks == ("Classification", "VQA", "Retrieval", "Grounding")
    for task in MMEB_MINI.meta_tasks:
        domains = {d.in_domain for d in MMEB_MINI.datasets if d.meta_task == task}
        assert domains == {True, False}, task


@pytest.mark.parametrize(("name", "least_rows"), sample_of([("root", 40), ("whole", 300)], [("root", 40)]))
def test_every_evaluation_row_is_read_with_its_positive_first_and_enough_candidates(request, name, least_rows):
    root = request.getfixturevalue(name)
    images: set[str] = set()
    for dataset in MMEB_MINI.datasets:
        rows = list(read_eval_rows(open_subset(root / "MMEB-eval", dataset, "test"), dataset))
        assert len(rows) >= least_rows
        for row in rows:
            assert isinstance(row, EvalRow)
            least = 10 if dataset.name == "Digits" else 20  # there are ten digits
            assert least <= len(row.candidates) <= 100
            assert row.candidates.count(row.candidates[0]) == 1
            images.update(path for item in (row.query, *row.candidates) for path in item.images)
    assert all((root / "images" / path).is_file() for path in images)


def test_v1_and_v2_are_the_same_rows_in_other_columns(root):
    for dataset in MMEB_MINI.datasets:
        v1 = open_subset(root / "MMEB-eval", dataset, "test")
        v2 = open_subset(root / "MMEB-eval-V2", dataset, "test")
        assert list(read_eval_rows(v1, dataset)) == list(read_eval_rows(v2, dataset))
        path = f"{dataset.name}/test-00000-of-00001.parquet"
        shared = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]
        assert sorted(pq.read_schema(root / "MMEB-eval" / path).names) == sorted(shared)
        assert sorted(pq.read_schema(root / "MMEB-eval-V2" / path).names) == sorted([*shared, "qry_inst", "tgt_inst"])


def test_mmebs_oddities_occur(root):
    tables = {d.name: pq.read_table(root / "MMEB-eval" / d.name).to_pylist() for d in MMEB_MINI.datasets}
    assert all(row["qry_text"].endswith("\n") for row in tables["Scenes_t2i"])
    web = tables["WebPages"][0]
    assert "<|image_1|>" in web["qry_text"]
    assert web["qry_img_path"] == ""
    assert next(d for d in MMEB_MINI.datasets if d.name == "Pointing-Matching").candidates_as_queries


@pytest.mark.exhaustive
def test_training_has_ten_thousand_pairs_in_both_splits(trained_on):
    total = 0
    for dataset in IN_DOMAIN:
        splits = {}
        for split in ("original", "diverse_instruction"):
            table = open_subset(trained_on / "MMEB-train", dataset, split)
            splits[split] = list(read_train_rows(table))
            assert all(isinstance(row, TrainRow) for row in splits[split])
            columns = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]
            assert sorted(table.columns) == sorted(columns)
            for row in splits[split]:
                for item in (row.query, row.positive):
                    assert all((trained_on / "MMEB-train" / path).is_file() for path in item.images)
        assert len(splits["original"]) == len(splits["diverse_instruction"])
        assert {r.query.text for r in splits["original"]} != {r.query.text for r in splits["diverse_instruction"]}
        total += len(splits["original"])
    assert total >= 10_000
    out_of_domain = {d.name for d in MMEB_MINI.datasets} - {d.name for d in IN_DOMAIN}
    assert not any((trained_on / "MMEB-train" / name).exists() for name in out_of_domain)


@pytest.mark.exhaustive
def test_unlabelled_positives_exist_and_the_truth_knows_them(trained_on):
    repeated = {}
    for dataset in IN_DOMAIN:
        truth = json.loads((trained_on / "truth" / f"{dataset.name}.json").read_text())
        rows = list(read_train_rows(open_subset(trained_on / "MMEB-train", dataset, "original")))
        assert len(truth) == len(rows)
        by_positive: dict = {}
        for row, meaning in zip(rows, truth, strict=True):
            by_positive.setdefault(row.positive, set()).add(meaning)
        assert all(len(meanings) == 1 for meanings in by_positive.values())
        distinct = Counter(by_positive[positive].copy().pop() for positive in by_positive)
        repeated[dataset.name] = sum(count - 1 for count in distinct.values())
        if dataset.meta_task == "Classification":
            assert len(by_positive) < len(rows) / 10  # a label is shared by many queries
    # Other images or captions of the same scene: positives of a query that are not labelled so. Distinct scenes are
    # an eighth of the rows, but for those that are drawn twice among 2560 or not chosen.
    assert 2400 - 300 <= repeated["Scenes_t2i"] <= 2400 - 250
    assert repeated["Scenes_i2t"] > 1500 * 0.8


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path, root, monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_QUERIES", 20)
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        benchmark.ensure("eval", tmp_path / folder, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a" / "images") != digest(tmp_path / "c" / "images")
    with pytest.raises(ValueError, match="seed"):
        benchmark.ensure("eval", tmp_path / "a", seed=4)


def test_an_interrupted_drawing_leaves_nothing_that_counts(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "NUM_QUERIES", 5)
    with monkeypatch.context() as broken:
        broken.setattr(benchmark, "_write_table", fail)
        with pytest.raises(KeyboardInterrupt):
            benchmark.ensure("eval", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [benchmark.LOCK]
    benchmark.ensure("eval", tmp_path)
    assert (tmp_path / "eval.json").is_file()


@pytest.mark.exhaustive
def test_evaluation_and_training_share_no_image(trained_on, whole):
    def digests(folder):
        return {hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.png")}

    assert not digests(whole / "images") & digests(trained_on / "MMEB-train" / "images")


def test_the_digits_are_scikit_learns_own_and_split_by_order(root):
    from sklearn.datasets import load_digits

    scans = load_digits()
    (train, train_labels), (test, test_labels) = train_digits(), digits_for_evaluation()
    assert len(train) + len(test) == len(scans.images) == 1797
    assert (test_labels == scans.target[-500:]).all()
    assert (train_labels == scans.target[:-500]).all()
    assert (test[0][::8, ::8, 0] == np.rint(scans.images[-500] * 255 / 16)).all()
    stored = {Image.open(path).tobytes() for path in (root / "images" / "Digits").glob("*.png")}
    assert stored <= {image.tobytes() for image in test}


def test_sugarcrepe_mini_has_the_originals_form(root):
    for folder, names, fields in (
        ("SugarCrepe", 7, {"filename", "caption", "negative_caption"}),
        ("SugarCrepe++", 5, {"filename", "caption", "caption2", "negative_caption"}),
    ):
        files = sorted((root / folder).glob("*.json"))
        assert len(files) == names
        for path in files:
            records = json.loads(path.read_text())
            assert list(records) == [str(i) for i in range(len(records))]
            for record in records.values():
                assert set(record) == fields
                assert (root / "val2017" / record["filename"]).is_file()
                assert len(set(record.values())) == len(fields)


def test_a_swapped_caption_has_the_same_words_and_another_meaning(root):
    for name in ("swap_obj", "swap_att"):
        for record in json.loads((root / "SugarCrepe" / f"{name}.json").read_text()).values():
            said = (record[key].lower().strip(".").replace("an ", "a ") for key in ("caption", "negative_caption"))
            first, second = (sorted(caption.split()) for caption in said)
            assert first == second
            assert record["caption"] != record["negative_caption"]
