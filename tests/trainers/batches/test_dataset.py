"""Sampling files and data become columns: pairs for clusters, further candidates for plain hard negatives."""

import pytest
from mmeb_files import COLOURS, M, write_images, write_table
from plain_encoder import PlainEncoder

from gen2embed_mteb.images.errors import ImageError
from trainers import OpenInputs, training_dataset
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data
from trainers.sampling.files import SamplingError, read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample

WORDS = ("cat", "dog", "cow")
NAMES = tuple(COLOURS)


def row(query, query_image, positive, positive_image=""):
    return {"qry": query, "qry_image_path": query_image, "pos_text": positive, "pos_image_path": positive_image}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Labels (15 rows, 5 labels, of which row 2 has no image) and captions (15 rows with candidates of their own)."""
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "images")
    labels = [row(f"{M}\nName it, {word}\n", f"images/{name}.png", name) for word in WORDS for name in NAMES]
    labels[2]["qry_image_path"] = "images/lost.png"
    captions = [row(f"Find: {name} {word}", "", f"a {word}", f"images/{name}.png") for word in WORDS for name in NAMES]
    write_table(folder / "VOC2007" / "original-00000-of-00001.parquet", labels)
    write_table(folder / "MSCOCO_t2i" / "original-00000-of-00001.parquet", captions)
    return folder


@pytest.fixture(scope="module")
def sampled(root, tmp_path_factory):
    """`sampled(method, k)`: the opened data, and the sampling files of both subsets."""

    def run(method, k=2, subsets=("VOC2007", "MSCOCO_t2i"), **changes):
        output = tmp_path_factory.mktemp(method)
        settings = {"num_hard_negatives": k, "pool_multiplier": 2, "subsets": subsets, "max_error_rate": 1, **changes}
        config = SampleConfig(data_dir=str(root), output_dir=str(output), method=method, **settings)
        data = open_training_data(config, config.images_cache)
        sample(PlainEncoder(), ModelRecord("plain", "", "none", "plain-1"), data, config)
        return data, [read_sampling(output / f"{name}.parquet") for name in subsets]

    return run


def cells(dataset, column):
    return [(cell["text"], tuple(cell["image"])) for cell in dataset[column]]


def test_pairs_keep_their_clusters_and_rows_set_aside_are_left_out(sampled):
    data, samplings = sampled("saha")
    train = training_dataset(data, samplings)
    assert train.dataset.column_names == ["query", "positive"]
    assert train.roles == {"query": "query", "positive": "document"}
    assert len(train.dataset) == train.clusters.num_rows == 14 + 15
    queries, positives = cells(train.dataset, "query"), cells(train.dataset, "positive")
    # Row ids of the first subset are one ahead of the dataset's from row 3 on, as row 2 has no image.
    assert queries[2] == (f"{M}\nName it, cat\n", ("images/white.png",))
    assert positives[14:] == [(f"a {word}", (f"images/{name}.png",)) for word in WORDS for name in NAMES]
    rows = iter(train.clusters.rows.tolist())
    for sampling, start, gap in zip(samplings, (0, 14), (1, 0), strict=True):
        clusters = sampling.clusters
        for anchor, members in zip(clusters.anchors.tolist(), clusters.members.tolist(), strict=True):
            ids = [anchor, *members]
            expected = [-1 if one < 0 else start + one - (gap if one > 2 else 0) for one in ids]
            assert next(rows) == expected
    # Equal positives, and only they, have equal numbers.
    numbers = train.clusters.positives
    assert all((numbers[i] == numbers[j]) == (positives[i] == positives[j]) for i in range(29) for j in range(29))


def test_in_batch_rows_are_clusters_of_one(sampled):
    data, samplings = sampled("in-batch", subsets=("MSCOCO_t2i",))
    train = training_dataset(data, samplings)
    assert train.clusters.rows.tolist() == [[row] for row in range(15)]


def test_hard_negatives_become_columns_whose_names_do_not_begin_one_another(sampled):
    data, samplings = sampled("hn", k=11, subsets=("MSCOCO_t2i",))
    train = training_dataset(data, samplings)
    names = train.dataset.column_names
    assert names == ["query", "positive", *(f"negative_{number}" for number in range(1, 12))]
    assert not any(other != name and other.startswith(f"{name}_") for name in names for other in names)
    assert train.num_drawn == 0
    assert train.clusters.rows.tolist() == [[row] for row in range(15)]
    positives = cells(train.dataset, "positive")
    for place in range(11):
        chosen = [positives[members[place]] for members in samplings[0].clusters.members.tolist()]
        assert cells(train.dataset, f"negative_{place + 1}") == chosen


def test_missing_negatives_are_drawn_from_the_subset_and_come_again_where_it_has_too_few(sampled):
    data, samplings = sampled("hn-beta", k=3, beta=-0.5)
    train = training_dataset(data, samplings)
    found = sum(int((sampling.clusters.members >= 0).sum()) for sampling in samplings)
    assert train.num_drawn == 29 * 3 - found > 0
    for example in train.dataset:
        negatives = [(cell["text"], *cell["image"]) for name, cell in example.items() if name.startswith("negative")]
        assert (example["positive"]["text"], *example["positive"]["image"]) not in negatives
        assert len(set(negatives)) == 3
        # Of the row's own subset: labels have no image, captions have one.
        assert {len(negative) for negative in negatives} == {1 if example["query"]["image"] else 2}
    assert training_dataset(data, samplings).dataset[:] == train.dataset[:]
    assert training_dataset(data, samplings, seed=1).dataset[:] != train.dataset[:]

    data, samplings = sampled("hn", k=6, subsets=("VOC2007",))  # five labels: four negatives a query
    train = training_dataset(data, samplings)
    assert train.num_drawn == 2 * 14
    for example in train.dataset:
        labels = [example[f"negative_{number}"]["text"] for number in range(1, 7)]
        assert sorted(labels[:4]) == sorted(set(NAMES) - {example["positive"]["text"]})
        assert labels[4:] == labels[:2]


def test_inputs_are_opened_when_they_are_read_and_keys_that_a_row_lacks_are_left_out(sampled, root):
    data, samplings = sampled("saha")
    dataset = training_dataset(data, samplings).dataset.with_transform(OpenInputs(data.images, min_side=56))
    labelled, captioned = dataset[0], dataset[20]
    assert labelled["positive"].keys() == {"text"}
    assert labelled["query"]["image"].size == (56, 56)
    assert labelled["query"]["image"].getpixel((0, 0)) == COLOURS["red"]
    assert captioned["query"].keys() == {"text"}
    assert captioned["positive"].keys() == {"text", "image"}
    opened = OpenInputs(data.images, "square-448").open({"text": "", "image": ["images/red.png", "images/blue.png"]})
    assert opened.keys() == {"image"}
    assert [image.size for image in opened["image"]] == [(448, 448)] * 2
    with pytest.raises(ImageError, match=r"images/lost\.png"):
        OpenInputs(data.images).open({"text": "", "image": ["images/lost.png"]})


def test_files_that_do_not_fit_the_data_are_refused(sampled, root):
    data, samplings = sampled("saha")
    other = open_training_data(DataConfig(data_dir=str(root), subsets=("VOC2007",)), root / "cache")
    with pytest.raises(SamplingError, match="subset 'MSCOCO_t2i' is not in the training data, which has VOC2007"):
        training_dataset(other, samplings)
    shorter = open_training_data(
        DataConfig(data_dir=str(root), subsets=("VOC2007", "MSCOCO_t2i"), limit=9), root / "cache"
    )
    with pytest.raises(SamplingError, match="made with other rows than these"):
        training_dataset(shorter, samplings)
    _, plain = sampled("hn", subsets=("MSCOCO_t2i",))
    with pytest.raises(SamplingError, match=r"method hn with k = 2, but .*: method saha with k = 2"):
        training_dataset(data, [samplings[0], plain[0]])


def test_hard_negatives_need_a_second_candidate(tmp_path):
    write_table(tmp_path / "d.parquet", [{"query": word, "positive": "same"} for word in WORDS])
    config = SampleConfig(data_dir=str(tmp_path / "d.parquet"), output_dir=str(tmp_path / "out"), method="hn")
    data = open_training_data(config, config.images_cache)
    sample(PlainEncoder(), ModelRecord("plain", "", "none", "plain-1"), data, config)
    with pytest.raises(SamplingError, match="all rows have one candidate"):
        training_dataset(data, read_sampling(tmp_path / "out" / "d.parquet"))
