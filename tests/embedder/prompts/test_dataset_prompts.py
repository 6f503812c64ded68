"""Prompts per dataset: in plain sentence-transformers, by name, in bulk; vectors of two datasets are never mixed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from samples import sample_of
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import DatasetEncoder, Item, StagedEncoder
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts.dataset_prompts import all_of, prompts_for
from gen2embed_mteb.embedder.prompts.slots import SLOTS
from gen2embed_mteb.embedder.prompts.strategies import TASK_STRATEGIES, prompts_of_datasets, task_prompt
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.source import ImageSource

FAMILIES = ("qwen2_vl", "llava_next", "gemma3")


@pytest.fixture(scope="module")
def inputs(pictures):
    texts = ["a red circle", {"text": "Find a page.\n"}]
    return [*texts, pictures[0], {"text": "<|image_1|>\nWhat?", "image": pictures[1]}]


def as_dicts(inputs: list) -> list[dict]:
    return [
        entry if isinstance(entry, dict) else {"text" if isinstance(entry, str) else "image": entry} for entry in inputs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mode", TASK_STRATEGIES)
@pytest.mark.parametrize("family", sample_of(FAMILIES, ["llava_next"]))
def test_an_exported_folder_gives_the_same_vectors_in_plain_sentence_transformers(tiny, exported, inputs, family, mode):
    model, stock = (
        tiny(family, prompt_mode=mode),
        SentenceTransformer(str(exported(family, prompt_mode=mode)), device="cpu"),
    )
    for side in ("query", "document"):
        live, plain = getattr(model, f"encode_{side}"), getattr(stock, f"encode_{side}")
        usual = live(inputs)
        assert np.abs(plain(inputs) - usual).max() < 1e-6
        for dataset in ("N24News", "NIGHTS", "Digits"):
            name = f"{dataset}:{side}"
            expected = live(inputs, prompt_name=name)
            assert np.abs(expected - usual).max() > 1e-3
            assert np.abs(plain(inputs, prompt_name=name) - expected).max() < 1e-6
            assert np.abs(plain(inputs, prompt=stock.prompts[name]) - expected).max() < 1e-6
            assert np.abs(stock.encode(inputs, prompt_name=name) - expected).max() < 1e-6
            assert np.abs(model.encode(inputs, prompt_name=name) - expected).max() < 1e-6
            # The same texts, built in.
            own = Gen2Embed(model.source, prompt_mode=task_prompt(mode, SLOTS[dataset]), device="cpu")
            assert np.abs(getattr(own, f"encode_{side}")(inputs) - expected).max() < 1e-6
            for encoder in (PrefixEncoder(model), model):
                bulk = getattr(encoder.for_dataset(dataset), f"encode_{side}")(as_dicts(inputs))
                assert np.abs(bulk - expected).max() < 1e-5


def test_the_prompts_are_in_the_folder_and_follow_the_strategy(tiny, exported):
    folder = exported("qwen2_vl", prompt_mode="freeret")
    again = Gen2Embed(folder, device="cpu")
    expected = prompts_of_datasets(again.prompt)
    assert again.prompt_mode == "freeret"
    assert all_of(again) == all_of(tiny("qwen2_vl", prompt_mode="freeret")) == expected
    assert fingerprint(again) == fingerprint(tiny("qwen2_vl", prompt_mode="freeret"))
    assert all_of(Gen2Embed(folder, prompt_mode="hierarchical", device="cpu")) == {}
    lens = Gen2Embed(folder, prompt_mode="lens", device="cpu")
    assert all_of(lens) == all_of(tiny("qwen2_vl", prompt_mode="lens")) != expected
    own = Gen2Embed(folder, prompt_mode=task_prompt("freeret", SLOTS["GQA"]), device="cpu")
    assert all_of(own) == {}  # the words of one task: the user's, for every dataset
    assert all_of(tiny("qwen2_vl")) == {}


def test_prompts_of_the_user_s_own(tiny_dir):
    given = {"N24News:query": "Which section?", "Mine:document": "A thing.", "clustering": "Cluster."}
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="freeret", prompts=given, device="cpu")
    assert {name: model.prompts[name] for name in given} == given
    assert prompts_for(model, "Mine") == {"document": "A thing."}
    assert model.prompts["N24News:document"].startswith("Above is the name of a news section.")
    plain = Gen2Embed(tiny_dir("qwen2_vl"), prompts=given, device="cpu")
    assert all_of(plain) == {name: given[name] for name in ("N24News:query", "Mine:document")}
    assert fingerprint(plain) != fingerprint(Gen2Embed(tiny_dir("qwen2_vl"), device="cpu"))


def test_the_name_of_a_prompt_tells_the_side(tiny):
    model = tiny("qwen2_vl", prompt_mode="freeret")
    with pytest.raises(Gen2EmbedError, match="prompt_name='N24News:query' is a query's, task='document' is not"):
        model.encode_document(["a"], prompt_name="N24News:query")
    with pytest.raises(
        Gen2EmbedError, match=r"unknown prompt_name 'N24:query'; known: query, .*, and of datasets: .*:query, …"
    ):
        model.encode_query(["a"], prompt_name="N24:query")


def test_what_is_known_of_a_dataset_is_said(tiny, caplog):
    caplog.set_level(logging.INFO, logger="gen2embed_mteb.embedder.prompts.dataset_prompts")
    encoder = PrefixEncoder(tiny("qwen2_vl", prompt_mode="freeret"))
    assert encoder.for_dataset("MyData") is None
    assert "MyData: no prompts for this dataset are known, the default ones are used" in caplog.text
    caplog.clear()
    assert PrefixEncoder(tiny("qwen2_vl")).for_dataset("MyData") is None
    assert caplog.text == ""
    assert encoder.for_dataset("GQA") is encoder.for_dataset("OK-VQA") is not encoder.for_dataset("DocVQA")


def test_the_shared_prefix_is_that_of_the_dataset(tiny):
    """`lens` tells the task first: the whole instruction is run once per dataset, and not counted per input."""
    model = tiny("qwen2_vl", prompt_mode="lens")
    usual = PrefixEncoder(model)
    news = usual.for_dataset("N24News")
    assert isinstance(news, StagedEncoder)
    assert isinstance(usual, DatasetEncoder)
    assert isinstance(model, DatasetEncoder)
    texts = ["a fox", "a much longer text about a fox"]
    for encoder, prompt in ((usual, None), (news, model.prompts["N24News:query"])):
        counts = encoder.count_tokens("query", texts, [[], []])
        prepared = encoder.prepare("query", [{"text": text} for text in texts])
        assert prepared.num_shared > 20
        assert np.abs(np.array(counts) - (prepared.last + 1).numpy()).max() <= 2  # tokens that merge
        total = model.count_tokens(texts, [[], []], task="query", prompt=prompt)
        assert np.abs(np.array(total) - counts - prepared.num_shared).max() <= 2
    assert news.prepare("query", [{"text": "x"}]).num_shared != usual.prepare("query", [{"text": "x"}]).num_shared


def test_vectors_of_the_same_item_in_two_datasets_are_not_mixed(tiny, tmp_path):
    model = tiny("qwen2_vl", prompt_mode="freeret")
    items = [Item("a fox"), Item("a dog")]
    datasets = ("N24News", "GQA", "OK-VQA", "MyData")

    def run(encoder: object) -> tuple[BulkEncoder, dict[str, np.ndarray]]:
        bulk = BulkEncoder(encoder, EmbeddingStore(tmp_path / "e", {"f": "1"}), ImageSource(tmp_path))
        found = {}
        for dataset in datasets:
            view = bulk.for_dataset(dataset)
            view.add("query", items)
            found[dataset] = view.vectors("query", items)
        return bulk, found

    bulk, found = run(PrefixEncoder(model))
    for dataset in datasets:
        name = {} if dataset == "MyData" else {"prompt_name": f"{dataset}:query"}
        expected = model.encode_query([item.text for item in items], **name)
        assert np.abs(found[dataset] - expected).max() < 1e-5
    assert np.abs(found["N24News"] - found["GQA"]).max() > 1e-3
    assert bulk.for_dataset("GQA") is bulk.for_dataset("OK-VQA")  # the same prompts: encoded once
    assert bulk.for_dataset("MyData") is bulk
    assert (bulk.num_encoded, bulk.num_reused) == (6, 0)
    with pytest.raises(KeyError):
        bulk.for_dataset("N24News").vectors("document", items)
    assert len(list((tmp_path / "e").glob("*.npy"))) == 3  # one shard per prompt, for the same texts
    # Resumed in any order, also by the model itself: each dataset finds its own shards again.
    datasets = ("MyData", "OK-VQA", "N24News", "GQA")
    again, same = run(PrefixEncoder(model))
    assert (again.num_encoded, again.num_reused) == (0, 6)
    for dataset in datasets:
        assert np.array_equal(same[dataset], found[dataset])
