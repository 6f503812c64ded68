"""From data with several positives and explicit negatives to batches: `sample`, the dataset, sampler and reader."""

import json
from pathlib import Path
from typing import Any

import pytest
from mmeb_files import write_images
from plain_encoder import PlainEncoder

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import SahaBatchSampler, SahaLoss, training_dataset
from trainers.batches.collation import CellReader
from trainers.batches.sampled import open_sampled_data
from trainers.data.training_data import open_training_data
from trainers.sampling.cluster_table import as_parquet
from trainers.sampling.files import read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample

WORDS = ("cat", "dog", "cow", "fox", "owl", "bee", "elk", "hen", "ant")
METHODS = ("saha", "hn", "hn-beta", "in-batch")


def rows() -> list[dict[str, Any]]:
    """Nine queries with one to three positives, some of them shared, and none to two explicit negatives."""
    found = []
    for number, word in enumerate(WORDS):
        positives = [f"a {word}", f"the {word}", f"a {WORDS[number - 1]}"][: 1 + number % 3]
        found.append(
            {"anchor": f"find the {word}", "positive": positives, "negative": [f"no {word}", "none"][: number % 3]}
        )
    return found


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def sampled(path: Path, method: str, **changes: Any) -> tuple[Any, Any]:
    settings = {"num_hard_negatives": 2, "pool_multiplier": 2, "max_error_rate": 1.0, **changes}
    output = path.parent / method
    config = SampleConfig(data_dir=str(path), output_dir=str(output), method=method, **settings)
    data = open_training_data(config, config.images_cache)
    sample(PlainEncoder(), ModelRecord("plain", "", "none", "plain-1"), data, config)
    return data, read_sampling(output / "pairs.parquet")


def batches_of(train: Any, size: int, epoch: int, seed: int = 3) -> list[list[int]]:
    sampler = SahaBatchSampler(train.dataset, size, seed=seed, sampling=train.clusters, num_processes=1)
    sampler.set_epoch(epoch)
    return list(sampler)


def text(cell: dict[str, Any]) -> str:
    return str(cell["text"])


@pytest.mark.parametrize("method", METHODS)
def test_no_positive_of_a_query_is_its_negative_in_any_batch_of_any_epoch(tmp_path: Path, method: str) -> None:
    data, sampling = sampled(write(tmp_path / "pairs.jsonl", rows()), method)
    positives = {row["anchor"]: set(row["positive"]) for row in rows()}
    train = training_dataset(data, sampling)
    width = train.clusters.width
    for epoch in range(4):
        for batch in batches_of(train, width, epoch):
            cells = [train.dataset[row] for row in batch]
            assert len({text(row["query"]) for row in cells}) == width or method == "saha"  # a filler may come again
            for row in cells:
                known = positives[text(row["query"])]
                assert text(row["positive"]) in known
                own = [text(row[name]) for name in row if name.startswith("negative")]
                assert not known & set(own)
    if method == "saha":
        for anchor, members in zip(sampling.clusters.anchors.tolist(), sampling.clusters.members.tolist(), strict=True):
            chosen = [set(rows()[row]["positive"]) for row in (anchor, *members) if row >= 0]
            assert len(set().union(*chosen)) == sum(map(len, chosen))


def test_every_positive_comes_once_in_as_many_epochs_as_there_are(tmp_path: Path) -> None:
    data, sampling = sampled(write(tmp_path / "pairs.jsonl", rows()), "in-batch")
    train = training_dataset(data, sampling)
    epochs = []
    for epoch in range(6):
        pairs = [train.dataset[row] for batch in batches_of(train, 3, epoch) for row in batch]
        epochs.append({text(row["query"]): text(row["positive"]) for row in pairs})
        assert len(epochs[-1]) == len(WORDS)  # each query once
    for row in rows():
        seen = [epoch[row["anchor"]] for epoch in epochs]
        count = len(row["positive"])
        assert all(set(seen[start : start + count]) == set(row["positive"]) for start in range(6 - count + 1))
    first = batches_of(train, 3, 0)
    assert first == batches_of(train, 3, 0)
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in batches_of(train, 3, 0, 4)}


def test_explicit_negatives_come_first_and_replace_none_that_was_mined(tmp_path: Path) -> None:
    data, sampling = sampled(write(tmp_path / "pairs.jsonl", rows()), "hn")
    train = training_dataset(data, sampling)
    assert train.dataset.column_names == ["query", "positive", *(f"negative_{n}" for n in range(1, 5))]
    plain = training_dataset(data, sampling, explicit_negatives=0)
    assert plain.dataset.column_names == ["query", "positive", "negative_1", "negative_2"]
    for row, without in zip(train.dataset, plain.dataset, strict=True):
        given = next(one["negative"] for one in rows() if one["anchor"] == row["query"]["text"])
        assert [row["negative_1"]["text"], row["negative_2"]["text"]] == [*given, None, None][:2]
        assert [row[f"negative_{n}"] for n in (3, 4)] == [without[f"negative_{n}"] for n in (1, 2)]
        assert not {text(row[f"negative_{n}"]) for n in (3, 4)} & set(given)
    assert sampling.record["counts"]["explicit_negatives"] == 9
    assert sampling.record["counts"]["positives"] == 18
    capped = training_dataset(data, sampling, explicit_negatives=1)
    assert len(capped.dataset.column_names) == 5


def test_a_member_of_plain_hard_negatives_names_one_of_a_rows_positives(tmp_path: Path) -> None:
    lines = [
        {"anchor": "red fox", "positive": ["blue", "red fox runs"]},
        {"anchor": "red fox runs", "positive": "something else"},
        {"anchor": "a cow", "positive": ["cow", "a cow stands"]},
    ]
    data, sampling = sampled(write(tmp_path / "pairs.jsonl", lines), "hn", num_hard_negatives=1)
    assert sampling.clusters.members.tolist()[1] == [0]
    assert sampling.clusters.places is not None and sampling.clusters.places.tolist()[1] == [1]
    train = training_dataset(data, sampling)
    assert [text(row["negative_1"]) for row in train.dataset if row["query"]["text"] == "red fox runs"] == [
        "red fox runs"
    ]
    again = read_sampling(sampling.path)
    assert as_parquet(again.clusters) == sampling.path.with_suffix(".parquet").read_bytes()


def test_an_explicit_negative_is_not_mined_once_more_under_another_name(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "blue.png").read_bytes())
    lines = [
        {"anchor": f"find {name}", "positive": {"image": f"images/{name}.png"}} for name in ("red", "blue", "green")
    ]
    lines[0]["negative"] = {"image": "images/copy.png"}
    lines[2]["negative"] = {"image": "images/lost.png"}
    _, sampling = sampled(write(tmp_path / "pairs.jsonl", lines), "hn", num_hard_negatives=1)
    assert sampling.clusters.anchors.tolist() == [0, 1]
    assert sampling.clusters.members.tolist() == [[-1], [0]]  # the first row's only other candidate is its negative


def test_a_negative_whose_image_cannot_be_opened_sets_its_row_aside(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    lines = [{"anchor": f"q{n}", "positive": f"p{n}", "negative": {"image": "images/red.png"}} for n in range(3)]
    lines[1]["negative"] = {"image": "images/lost.png"}
    for method in ("saha", "in-batch"):
        _, sampling = sampled(write(tmp_path / "pairs.jsonl", lines), method)
        assert sampling.record["counts"]["errors"] == 1
        assert 1 not in sampling.clusters.anchors.tolist()
        (error,) = (tmp_path / method / "errors.jsonl").read_text().splitlines()
        assert json.loads(error)["row"] == 1 and "lost.png" in error


OLD = {
    "saha": [[7, 2, 3], [8, 0, 4], [3, 4, 5], [6, 0, 1], [0, 1, 2]],
    "hn": [[1, 4, 6], [7, 0, 2], [5, 3, 8]],
}
"""The batches of seed 3, epoch 0, that the version before lists and negatives made of the files below."""


@pytest.mark.parametrize("method", OLD)
def test_files_of_earlier_versions_give_the_batches_they_gave(tmp_path: Path, method: str) -> None:
    """Then, a column `negative` was not read, and records did not say so."""
    lines = [{"anchor": f"find the {word}", "positive": f"a {word}", "negative": f"no {word}"} for word in WORDS]
    _, sampling = sampled(write(tmp_path / "pairs.jsonl", lines), method, pairs_only=True)
    record = json.loads(sampling.path.read_text())
    assert record["data"].pop("pairs_only") is True
    sampling.path.write_text(json.dumps(record))
    old = read_sampling(sampling.path)
    assert old.record["data"]["digest"] == "0a25d661e49a511d705ed7c423c7b83d"
    train = training_dataset(open_sampled_data([old]), old, 3)
    names = ["query", "positive"] if method == "saha" else ["query", "positive", "negative_1", "negative_2"]
    assert train.dataset.column_names == names
    assert set(train.dataset[0]["query"]) == {"text", "image"}
    assert batches_of(train, 3, 0) == OLD[method]


def test_what_cells_state_becomes_features_and_the_loss_leaves_it_out(tmp_path: Path, tiny_dir: Any) -> None:
    data, sampling = sampled(write(tmp_path / "pairs.jsonl", rows()), "in-batch")
    train = training_dataset(data, sampling)
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    reader = CellReader(model)
    batch = train.dataset[:6]
    with pytest.raises(Gen2EmbedError, match="nothing to encode"):
        reader(batch["negative_2"], task="document")  # a loss that cannot leave it out
    reader.states_facts = True
    features = [reader(cells, task="document" if name != "query" else "query") for name, cells in batch.items()]
    assert features[2]["absent"].tolist() == [cell["text"] is None for cell in batch["negative_1"]]
    of_query = [{features[1]["candidate_number"][n].item() for n in range(6) if text(batch["query"][n]) == text(one)}
                for one in batch["query"]]  # fmt: skip
    for own, known, number in zip(
        of_query, features[0]["known_positives"], features[1]["candidate_number"], strict=True
    ):
        assert number.item() in own and own <= set(known.tolist())
    value = SahaLoss(model, mini_batch_size=4)(features)
    value.backward()
    assert value.isfinite()
    del batch["positive"][0]["text"]
    features[1] = reader(batch["positive"], task="document")
    with pytest.raises(Gen2EmbedError, match="row 0 of a batch has no positive; only negatives may be missing"):
        SahaLoss(model)(features)
