"""`gen2embed push` against a server with the interface of the hub: what is sent, what is not, what can go wrong."""

import json
import re

import numpy as np
import pytest
from hub_server import TOKEN, running_hub
from safetensors.numpy import save_file

from gen2embed_mteb import cli
from gen2embed_mteb.embedder.model_folder.saving import WRITER
from gen2embed_mteb.hub.plans import planned
from gen2embed_mteb.push_command.model_folder import SENT, model_plan
from trainers.sampling.files import SampledClusters, write_sampling
from trainers.sampling.publishing import sampling_plan

assert WRITER == "export"
COUNTS = ("rows", "queries", "candidates", "errors", "clusters", "phase_1", "phase_2", "short", "reused")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(monkeypatch, tmp_path / "hub-cache") as hub:
        yield hub


@pytest.fixture
def model(tmp_path):
    """A folder as `train` leaves it: two weights of a few bytes, settings, a card, and much that is not the model."""
    folder = tmp_path / "model"
    for name in ("1_Pooling", "checkpoint-3", "runs", "eval"):
        (folder / name).mkdir(parents=True)
    save_file({"a": np.arange(3.0)}, folder / "model.safetensors")
    save_file({"b": np.arange(5.0)}, folder / "adapter_model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags:\n- a\n---\n# Mine\n")
    for name in ("optimizer.pt", "pytorch_model.bin", "train.json", "run.log", "notes.txt", "modeling.py", ".hidden"):
        (folder / name).write_text("not sent")
    (folder / "checkpoint-3" / "optimizer.pt").write_text("not sent")
    return folder


MODEL = {"1_Pooling/config.json", "README.md", "adapter_model.safetensors", "config.json", "model.safetensors"}
MODEL |= {"modules.json"}


@pytest.fixture
def sampled(tmp_path):
    """A folder as `sample` leaves it."""
    folder = tmp_path / "saha"
    for name, rows in (("Colours", 6), ("Shapes", 4)):
        record = {
            "subset": name,
            "method": "saha",
            "settings": {"num_hard_negatives": 2, "beta": None},
            "data": {
                **{"data_dir": "TIGER-Lab/MMEB-train", "image_dir": "", "source": "x.parquet", "split": "original"},
                **{"columns": [], "image_columns": [], "limit": None, "num_rows": rows, "digest": "d" * 32},
            },
            "model": {"name": "gen2embed-mini", "revision": "", "prompt_mode": "hierarchical", "fingerprint": "f" * 64},
            "counts": dict.fromkeys(COUNTS, 0) | {"clusters": 2, "phase_1": 1, "phase_2": 1, "short": 1},
            "seconds": {"encode": 0.0, "mine": 0.0},
        }
        similarities = np.array([[0.25, 0.5], [0.75, np.nan]], dtype=np.float32)
        members = np.array([[1, 2], [2, -1]])
        write_sampling(folder, record, SampledClusters(np.array([0, 3]), members, np.array([1, 2]), similarities))
    (folder / "embeddings").mkdir()
    (folder / "errors.jsonl").write_text("")
    (folder / "Colours_hard_negatives.json").write_text("[]")
    return folder


def push(folder, *more):
    return cli.main(["push", str(folder), "me/it", *more])


def test_a_model_arrives_whole_and_nothing_else_does(hub, model, capsys):
    assert push(model) == 0
    repo = hub.repos["models", "me/it"]
    assert repo.private
    files = repo.files("main")
    assert set(files) == MODEL | {".gitattributes"}
    assert all(files[name] == (model / name).read_bytes() for name in MODEL)
    assert len(hub.asked("POST", "/commit/main")) == 1
    printed = capsys.readouterr().out
    assert f"/me/it: 6 files were sent, and read back, commit {repo.branches['main']}" in printed
    assert hub.tokens == {TOKEN} and TOKEN not in printed

    assert push(model) == 0
    assert "nothing was sent" in capsys.readouterr().out
    assert len(repo.commits) == 2, "the same again is no commit"


def test_the_dry_run_asks_the_hub_nothing_and_says_everything(hub, model, capsys):
    assert push(model, "--dry_run", "--public") == 0
    assert not hub.requests
    printed = capsys.readouterr().out
    for name in MODEL:
        size, sha256 = (made := planned(name, model / name)).size, made.sha256
        assert re.search(rf"^{re.escape(name)} +{size} +{sha256}$", printed, re.M)
    for name, reason in (
        ("checkpoint-3/", "optimizer states"),
        ("optimizer.pt", "a pickle"),
        ("pytorch_model.bin", "a pickle"),
        ("run.log", "a log"),
        ("train.json", "names folders of this machine"),
        ("modeling.py", "code is never sent"),
        ("notes.txt", "not known"),
    ):
        assert re.search(rf"^  {re.escape(name)} +.*{reason}", printed, re.M), name
    assert "# Mine" in printed and "model me/it (public)" in printed


def test_sampling_files_get_a_card_and_are_read_by_address(hub, sampled, capsys):
    from trainers.batches.sampled import read_samplings

    assert push(sampled, "--public") == 0
    repo = hub.repos["datasets", "me/it"]
    files = repo.files("main")
    assert set(files) == {".gitattributes", "README.md"} | {
        f"{n}.{e}" for n in ("Colours", "Shapes") for e in ("parquet", "json")
    }
    assert not repo.private
    card = files["README.md"].decode()
    assert '- config_name: "Colours"\n  data_files: "Colours.parquet"' in card
    assert f"| Shapes | 4 | 2 | 1 | 1 | 0 | `{'d' * 32}` | `{planned('x', files['Shapes.parquet']).sha256}` |" in card
    assert "`TIGER-Lab/MMEB-train`, split `original`" in card
    address = f"hf://datasets/me/it@{repo.branches['main']}"
    assert address in capsys.readouterr().out

    local = read_samplings(str(sampled))
    read = read_samplings(address)
    assert [one.record for one in read] == [one.record for one in local]
    (alone,) = read_samplings(f"{address}/Colours.parquet")
    np.testing.assert_array_equal(alone.clusters.members, local[0].clusters.members)
    assert push(sampled, "--public") == 0 and len(repo.commits) == 2


def test_a_push_that_was_interrupted_goes_on(hub, model, capsys):
    hub.faults = {"upload": 1}
    assert push(model) == 2
    assert "run the same command again" in capsys.readouterr().err
    assert len(hub.uploads) == 1 and set(hub.repos["models", "me/it"].files("main")) == {".gitattributes"}
    hub.faults = {"commit": True}
    assert push(model) == 2
    assert "500" in capsys.readouterr().err
    assert len(hub.uploads) == 2
    hub.faults = {}
    assert push(model) == 0
    assert len(hub.uploads) == 2, "what arrived is not sent again"
    assert set(hub.repos["models", "me/it"].files("main")) > MODEL


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"refuse": True}, "hf auth login"),
        ({"cut": "model.safetensors"}, "model.safetensors has .* bytes, not .*--overwrite"),
        ({"digest": "config.json"}, "config.json has the digest .*, not "),
        ({"race": True}, "412.*somebody else changed it"),
    ],
)
def test_what_goes_wrong_on_the_way_is_said_in_one_line(hub, model, capsys, faults, said):
    hub.faults = faults
    assert push(model) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1, error
    assert TOKEN not in error


def test_files_of_others_are_not_replaced(hub, model, capsys):
    hub.add("me/it", {"README.md": b"edited on the web", "config.json": b"{}"}, kind="models", private=True)
    assert push(model) == 2
    assert "holds README.md, config.json with another content" in capsys.readouterr().err
    assert push(model, "--overwrite") == 0
    assert hub.repos["models", "me/it"].files("main")["README.md"] == (model / "README.md").read_bytes()

    hub.add("me/it", {"model-00001-of-00002.safetensors": b"of another"}, kind="models")
    assert push(model, "--overwrite") == 2
    assert "model-00001-of-00002.safetensors, which is not of this folder" in capsys.readouterr().err


def test_a_repository_that_somebody_made_meanwhile_is_used(hub, model):
    hub.add("me/it", {}, kind="models", private=True)
    hub.faults = {"unseen": True}
    assert push(model) == 0
    assert hub.asked("POST", "/repos/create") and set(hub.repos["models", "me/it"].files("main")) == MODEL


def test_a_public_repository_is_not_filled_by_accident(hub, model, capsys):
    hub.add("me/it", {}, kind="models")
    assert push(model) == 2
    assert "is public" in capsys.readouterr().err
    assert push(model, "--public", "--revision", "v1") == 0
    repo = hub.repos["models", "me/it"]
    assert set(repo.files("main")) == set() and set(repo.files("v1")) >= MODEL


def test_without_network_or_token_nothing_is_tried(hub, model, capsys, monkeypatch):
    from huggingface_hub import constants

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert push(model) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(model / "no-token"))
    assert push(model) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not hub.requests


def test_the_card_gets_the_figures_of_this_model_alone(model, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    record = {"model": str(model), "prompt_mode": "hierarchical", "fingerprint": "abc"}
    (results / "results.json").write_text(json.dumps(record))
    (results / "results.md").write_text("# MMEB\n\n| | P@1 |\n| --- | ---: |\n| ours | 43.3 |\n")
    card = model_plan(model, "me/it", [str(results)]).card
    assert card.startswith("---\ntags:") and "## Evaluation\n\n### MMEB\n\n| | P@1 |" in card
    assert "prompt `hierarchical`, fingerprint `abc`" in card
    assert (model / "README.md").read_text() == "---\ntags:\n- a\n---\n# Mine\n", "the local card stays as it was"
    (results / "results.json").write_text(json.dumps(record | {"model": "Qwen/Qwen2-VL-2B-Instruct"}))
    with pytest.raises(ValueError, match="is of Qwen/Qwen2-VL-2B-Instruct, not of"):
        model_plan(model, "me/it", [str(results)])


def test_a_link_a_missing_shard_and_a_pickle_are_not_sent(model, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    assert ("tokenizer.json", "a link, or no regular file") in model_plan(model, "me/it").left_out
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-00001-of-00001\.safetensors is missing"):
        model_plan(model, "me/it")
    index.unlink()
    for name in ("model.safetensors", "adapter_model.safetensors"):
        (model / name).unlink()
    with pytest.raises(ValueError, match="no weights in safetensors, and pickles are not sent"):
        model_plan(model, "me/it")


def test_a_file_that_names_a_folder_of_this_machine_is_noted(model, capsys):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/secret-project/base"}')
    assert push(model, "--dry_run") == 0
    assert (
        "note: adapter_config.json names a place of this machine, /home/me/secret-project/base,"
        in capsys.readouterr().out
    )


def test_a_base_model_in_a_folder_and_pictures_of_the_card_are_noted(model, tmp_path, capsys):
    """Wherever the folder is: it is one if it exists."""
    (tmp_path / "base").mkdir()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (model / "assets").mkdir()
    with (model / "README.md").open("a") as card:
        card.write("See /not/there and https://example.org/a/b, and assets/image_0.jpg\n")
    assert push(model, "--dry_run") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: README.md shows pictures of your data in assets/, which are not sent; take these lines out",
        f"note: adapter_config.json names a place of this machine, {tmp_path / 'base'}, which all readers will see; "
        "write the hub id of the base model there, by which others can load the adapter",
    ]


@pytest.mark.parametrize("place", ["here/my bäse", "here"])
def test_a_relative_base_model_would_be_taken_for_a_hub_id(model, tmp_path, monkeypatch, place):
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (model / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": place}))
    (note,) = model_plan(model, "me/it").notes
    assert f"adapter_config.json names a place of this machine, {place}, which" in note
    monkeypatch.chdir(model)  # it is none from here
    assert model_plan(model, "me/it").notes == ()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / place)}))
    assert str(tmp_path / place) in model_plan(model, "me/it").notes[0]


def test_a_damaged_sampling_file_is_not_sent(sampled):
    table = sampled / "Shapes.parquet"
    table.write_bytes(table.read_bytes()[:-4])
    with pytest.raises(ValueError, match="checksum differs"):
        sampling_plan(sampled, "me/it")


@pytest.mark.parametrize("words", [["push", "x", "no-owner"], ["push", "x", "a/b", "--revision", "a b"]])
def test_names_are_checked_first(words, capsys):
    assert cli.main(words) == 2
    assert "pass" in capsys.readouterr().err


@pytest.mark.slow
def test_every_file_of_an_export_is_sent(tiny, tmp_path):
    """An export that loads from the hub needs all that it wrote."""
    from gen2embed_mteb.storage.owned_folder import LEDGER, LOCK

    tiny("qwen2_vl").save_pretrained(str(tmp_path / "out"))
    plan = model_plan(tmp_path / "out", "me/it")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {file.name for file in plan.files} == there - {LEDGER, LOCK}
    card = plan.card
    assert 'model = SentenceTransformer("me/it")\nqueries = model.encode_query(' in card
    assert "sentence_transformers_model_id" not in card and card.count("## Queries and documents") == 1
    assert card.index("## Queries and documents") < card.index("## Model Details")
    assert SENT.fullmatch("model-00001-of-00002.safetensors") and not SENT.fullmatch("model.pt")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_pushed_model_loads_from_the_hub_with_the_same_vectors(hub, tiny, tmp_path):
    from sentence_transformers import SentenceTransformer

    from gen2embed_mteb import Gen2Embed

    model = tiny("qwen2_vl")
    model.save_pretrained(str(tmp_path / "out"))
    assert push(tmp_path / "out") == 0
    want = model.encode_query(["a red circle"])
    for loaded in (SentenceTransformer("me/it", device="cpu"), Gen2Embed("me/it", device="cpu")):
        assert np.abs(loaded.encode_query(["a red circle"]) - want).max() < 1e-6
