"""Data by `hf://` address: all of one commit, in the hub's cache, and nothing of the network without an address."""

import io
import json

import pytest
from hub_server import running_hub
from mmeb_files import colour_rows, write_table
from PIL import Image

from gen2embed_mteb import cli
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.evaluation.run import find_images
from gen2embed_mteb.hub import addresses
from gen2embed_mteb.hub.addresses import HUB_ID, in_hub_cache, local_place, split_revision
from gen2embed_mteb.hub.errors import HubError
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.tables import open_subset
from trainers.batches.sampled import open_sampled_data, read_samplings
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data

PAIRS = b"".join(json.dumps({"anchor": f"q{n}", "positive": f"p{n}"}).encode() + b"\n" for n in range(3))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(monkeypatch, tmp_path / "hub-cache") as hub:
        yield hub


def queries(data):
    return [row.query.text for subset in data.subsets for row in subset.rows()]


def test_training_pairs_of_a_pinned_commit_stay_the_same(hub, tmp_path):
    old = hub.add("me/pairs", {"pairs.jsonl": PAIRS, "big.bin": b"not wanted"})
    hub.add("me/pairs", {"pairs.jsonl": PAIRS.replace(b"q", b"changed ")})
    pinned = open_training_data(DataConfig(data_dir=f"hf://datasets/me/pairs@{old}"), tmp_path / "cache")
    assert queries(pinned) == ["q0", "q1", "q2"]
    newest = open_training_data(DataConfig(data_dir="hf://datasets/me/pairs/pairs.jsonl"), tmp_path / "cache")
    assert queries(newest) == ["changed 0", "changed 1", "changed 2"]
    assert not any("big.bin" in path for _, path in hub.requests), "only tables are downloaded"


def test_images_beside_tables_are_asked_for(hub, tmp_path):
    row = {"qry": "<|image_1|>\nq", "qry_image_path": "images/a.png", "pos_text": "p", "pos_image_path": ""}
    table = write_table(tmp_path / "t.parquet", [row | {"neg_text": "", "neg_image_path": ""}])
    hub.add("me/train", {"GQA/original-00000-of-00001.parquet": table.read_bytes()})
    with pytest.raises(DataError, match="pass --image_dir"):
        open_training_data(DataConfig(data_dir="hf://datasets/me/train"), tmp_path / "cache")


def test_sample_runs_on_an_address_and_its_record_names_it(hub, tmp_path, capsys):
    sha = hub.add("me/pairs", {"pairs.jsonl": PAIRS})
    address = f"hf://datasets/me/pairs@{sha}"
    words = ["sample", "--method", "in-batch", "--data_dir", address, "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    record = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert record["data"]["data_dir"] == address and record["data"]["num_rows"] == 3
    # Training finds the data again by the record alone.
    assert queries(open_sampled_data(read_samplings(str(tmp_path / "out")))) == ["q0", "q1", "q2"]


def test_a_second_run_without_network_finds_what_the_first_read(hub, monkeypatch):
    from huggingface_hub import constants

    sha = hub.add("me/pairs", {"pairs.jsonl": PAIRS})
    address = f"hf://datasets/me/pairs@{sha}"
    place = local_place(address)
    assert (place / "pairs.jsonl").read_bytes() == PAIRS and in_hub_cache(place)
    addresses._downloaded.cache_clear()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_place(address) == place and len(hub.requests) == asked
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        local_place("hf://datasets/me/other")


def test_an_evaluation_reads_tables_and_images_by_address(hub, tmp_path):
    table = write_table(tmp_path / "t.parquet", colour_rows(["red", "blue"]))
    with io.BytesIO() as file:
        Image.new("RGB", (40, 40), "red").save(file, "PNG")
        png = file.getvalue()
    hub.add("me/eval", {"VOC2007/test-00000-of-00001.parquet": table.read_bytes(), "images/img/red.png": png})
    (info,) = MMEB.select(("VOC2007",), ()).datasets
    assert open_subset("hf://datasets/me/eval", info, "test").num_rows == 2
    with pytest.raises(FileNotFoundError, match="--image_dir"):
        find_images("hf://datasets/me/eval")
    images = find_images("hf://datasets/me/eval", "hf://datasets/me/eval/images")
    assert images.open("img/red.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_file_that_arrives_cut_short_is_not_read(hub):
    hub.add("me/pairs", {"pairs.jsonl": PAIRS})
    hub.faults = {"cut": "pairs.jsonl"}
    with pytest.raises(HubError, match=r"hf://datasets/me/pairs: cannot be read .*run the same command again"):
        local_place("hf://datasets/me/pairs")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://me/model", "a model, and data is read from data sets"),
        ("hf://datasets/me", "no address of the hub"),
        ("hf://datasets/me/pairs/../x", "no address|'\\.\\.'"),
        ("hf://datasets/me/pairs@nowhere", "check the name"),
        ("hf://datasets/me/pairs/nothing", "there is no"),
        ("hf://datasets/nobody/nothing", "check the name"),
    ],
)
def test_a_wrong_address_is_refused_with_its_remedy(hub, address, said):
    hub.add("me/pairs", {"pairs.jsonl": PAIRS})
    with pytest.raises((DataError, HubError), match=said):
        local_place(address)


def test_hub_ids_may_be_pinned():
    assert split_revision("TIGER-Lab/MMEB-eval") == ("TIGER-Lab/MMEB-eval", None)
    assert split_revision("TIGER-Lab/MMEB-eval@v1") == ("TIGER-Lab/MMEB-eval", "v1")
    assert HUB_ID.fullmatch("a/b@refs/convert/parquet") and not HUB_ID.fullmatch("a/b/c")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_datasets_loads_a_pinned_id_and_what_was_pushed(hub, tmp_path, monkeypatch):
    """The real client of the hub's data sets: our card's configurations are its names."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    sha = hub.add("me/pairs", {"pairs.jsonl": PAIRS})
    hub.add("me/pairs", {"pairs.jsonl": PAIRS.replace(b"q", b"changed ")})
    assert queries(open_training_data(DataConfig(data_dir=f"me/pairs@{sha}"), tmp_path / "cache")) == ["q0", "q1", "q2"]

    words = ["sample", "--method", "in-batch", "--data_dir", f"me/pairs@{sha}", "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert cli.main(["push", str(tmp_path / "out"), "me/negatives"]) == 0
    (name,) = datasets.get_dataset_config_names("me/negatives")
    assert datasets.load_dataset("me/negatives", name, split="train")["anchor"] == [0, 1, 2]


def test_a_path_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(addresses, "_downloaded", None)
    assert local_place("~/x") == tmp_path / "x"
