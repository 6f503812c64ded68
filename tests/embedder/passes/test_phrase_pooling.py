"""The mean over the phrase: against single, unpadded forwards, in every way of encoding; where it is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import sample_of
from tiny_any import TEXT_ONLY

from gen2embed_mteb import Gen2Embed, HierarchicalPrompt
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.phrase_pooling import mean_of_last, phrase_tokens
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts.slots import SLOTS
from gen2embed_mteb.embedder.prompts.strategies import task_prompt
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.source import ImageSource

FAMILIES = ("qwen2_vl", "llava_next", "gemma3", "qwen3_5", "llama")
"""By hand with 3-D positions, by hand without special tokens, sliding windows, recurrent states, text alone."""
FORWARD = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_sizes")
FORWARD += ("mm_token_type_ids", "token_type_ids", "pixel_attention_mask")


@pytest.fixture(scope="module")
def inputs(pictures):
    texts = [
        {"text": "a red circle"},
        {"text": "Find a page of the longest river.\n"},
        {"text": ""},
        {"text": "x " * 60},
    ]
    return [*texts, {"image": pictures[0]}, {"text": "<|image_1|>\nWhat?\n", "image": pictures[1]}]


def oracle(model: Gen2Embed, entry: dict, side: str, prompt: str | None = None) -> np.ndarray:
    """One unpadded forward of the plain model; the mean of the states of all tokens that reach into the phrase.

    The tokens are found from the end: the shortest end of the ids whose text contains the whole phrase.
    """
    phrase = model.prompt.with_caller(prompt).phrase(side)
    features = model.preprocess([entry], prompt=prompt, task=side)
    ids = features["input_ids"][0]
    assert bool(features["attention_mask"].all())
    count = next(n for n in range(1, len(ids)) if phrase.lstrip() in model.tokenizer.decode(ids[-n:]))
    taken = {name: value for name, value in features.items() if name in FORWARD}
    with torch.inference_mode():
        states = model[0].model(**taken).last_hidden_state[0]
    mean = states[-count:].double().mean(dim=0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("family", sample_of(FAMILIES, ["qwen2_vl", "llama"]))
def test_every_way_of_encoding_gives_the_mean_over_the_phrase(tiny, inputs, family):
    model = tiny(family, prompt_mode="lens", pooling="phrase")
    given = inputs[:4] if family in TEXT_ONLY else inputs
    for side in ("query", "document"):
        expected = np.stack([oracle(model, entry, side) for entry in given])
        encode, encoder = getattr(model, f"encode_{side}"), PrefixEncoder(model)
        assert np.abs(encode(given) - expected).max() < 1e-5
        assert np.abs(encode(given[::-1], batch_size=2)[::-1] - expected).max() < 1e-5
        cached = getattr(encoder, f"encode_{side}")
        assert np.abs(cached(given) - expected).max() < 1e-5
        assert np.abs(np.concatenate([cached([entry]) for entry in given]) - expected).max() < 1e-5
        assert encoder.reuses_prefix
        full = getattr(PrefixEncoder(model, reuse_prefix=False), f"encode_{side}")
        assert np.abs(full(given) - expected).max() < 1e-5
        last = tiny(family, prompt_mode="lens")
        assert np.abs(getattr(last, f"encode_{side}")(given) - expected).max() > 1e-2


def test_the_side_of_the_padding_changes_nothing(tiny_dir, inputs):
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="lens", pooling="phrase", device="cpu")
    expected = np.stack([oracle(model, entry, "query") for entry in inputs])
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        assert np.abs(model.encode_query(inputs) - expected).max() < 1e-5
        assert np.abs(PrefixEncoder(model).encode_query(inputs) - expected).max() < 1e-5


def test_a_dataset_s_phrase_is_averaged_with_its_own_length(tiny, inputs):
    model = tiny("qwen2_vl", prompt_mode="lens", pooling="phrase")
    for dataset in ("N24News", "ColorShape"):
        prompt = model.prompts[f"{dataset}:query"]
        expected = np.stack([oracle(model, entry, "query", prompt) for entry in inputs])
        assert np.abs(model.encode_query(inputs, prompt=prompt) - expected).max() < 1e-5
        assert np.abs(PrefixEncoder(model).for_dataset(dataset).encode_query(inputs) - expected).max() < 1e-5
        fixed = task_prompt("lens", SLOTS[dataset])  # the same texts built in, as those of a user
        own = Gen2Embed(model.source, prompt_mode=fixed, pooling="phrase", device="cpu")
        assert np.abs(own.encode_query(inputs) - expected).max() < 1e-5
    conversation = [{"role": "system", "content": "Look.\nSeen:"}, {"role": "user", "content": "a fox"}]
    mixed = model.encode_query([conversation, "a fox"])  # two phrases of unequal length in one batch
    assert np.abs(mixed[0] - oracle(model, {"text": "a fox"}, "query", "Look.\nSeen:")).max() < 1e-5
    assert np.abs(mixed[1] - oracle(model, {"text": "a fox"}, "query")).max() < 1e-5


def test_a_text_that_is_cut_keeps_the_phrase(tiny_dir):
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="lens", pooling="phrase", device="cpu")
    model.max_seq_length = model.count_tokens([""], [[]], task="query")[0] + 20
    long = {"text": "word " * 400}
    features = model.preprocess([long], task="query")
    assert model.max_seq_length - 2 <= features["input_ids"].shape[1] <= model.max_seq_length
    assert model.tokenizer.decode(features["input_ids"][0]).endswith("\nThe meaning in one word:")
    assert np.abs(model.encode_query([long])[0] - oracle(model, long, "query")).max() < 1e-5


def test_bulk_encoding_through_the_store(tiny, tmp_path):
    model = tiny("qwen2_vl", prompt_mode="lens", pooling="phrase")
    items = [Item("a fox"), Item("a much longer text about a fox and a dog"), Item("")]
    bulk = BulkEncoder(PrefixEncoder(model), EmbeddingStore(tmp_path / "e", {"f": "1"}), ImageSource(tmp_path))
    bulk.add("query", items)
    expected = np.stack([oracle(model, {"text": item.text}, "query") for item in items])
    assert np.abs(bulk.vectors("query", items) - expected).max() < 1e-5


def test_means_are_computed_by_hand():
    states = torch.tensor([[[1.0], [2.0], [4.0], [float("nan")]], [[10.0], [20.0], [40.0], [80.0]]])
    found = mean_of_last(states, torch.tensor([2, 3]), torch.tensor([2, 4]))
    assert found.tolist() == [[3.0], [37.5]]
    padded_left = torch.tensor([[[float("nan")], [float("nan")], [6.0]], [[1.0], [2.0], [3.0]]])
    assert mean_of_last(padded_left, torch.tensor([2, 2]), torch.tensor([1, 3])).tolist() == [[6.0], [2.0]]


def test_a_token_with_characters_before_the_phrase_counts(tiny):
    tokenizer = tiny("qwen2_vl").tokenizer
    ids = tokenizer("a red circle", add_special_tokens=False)["input_ids"]
    spans = tokenizer("a red circle", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for start in range(1, len("a red circle")):
        expected = [token for token, (_, end) in zip(ids, spans, strict=True) if end > start]
        assert phrase_tokens(tokenizer, "a red circle", "a red circle"[start:]) == expected
    with pytest.raises(Gen2EmbedError, match=r"ends in 'a red circle', not in the phrase 'blue'"):
        phrase_tokens(tokenizer, "a red circle", "blue")


def test_it_is_part_of_the_fingerprint(tiny):
    last, phrase = tiny("qwen2_vl", prompt_mode="lens"), tiny("qwen2_vl", prompt_mode="lens", pooling="phrase")
    assert fingerprint(last) != fingerprint(phrase)
    assert (last.pooling, phrase.pooling) == ("last", "phrase")


def test_it_is_refused_where_there_is_no_phrase(tiny_dir, exported):
    for mode in ("hierarchical", "freeret", HierarchicalPrompt(query_phrase="Seen:")):
        with pytest.raises(Gen2EmbedError, match=r"has none on both sides; pass prompt_mode='lens'"):
            Gen2Embed("there is no such model", prompt_mode=mode, pooling="phrase")  # before anything is read
    with pytest.raises(Gen2EmbedError, match="'hierarchical' has none"):
        Gen2Embed(exported("qwen2_vl"), pooling="phrase", device="cpu")
    with pytest.raises(Gen2EmbedError, match="unknown pooling 'mean'; known: last, phrase"):
        Gen2Embed(tiny_dir("qwen2_vl"), pooling="mean")


def test_an_exported_folder_can_be_read_out_so_but_not_written(tiny, exported, tmp_path, inputs):
    model = tiny("qwen2_vl", prompt_mode="lens", pooling="phrase")
    with pytest.raises(Gen2EmbedError, match="pooling='phrase' cannot be saved: no stock module can express it"):
        model.save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    again = Gen2Embed(exported("qwen2_vl", prompt_mode="lens"), pooling="phrase", device="cpu")
    assert np.abs(again.encode_query(inputs) - model.encode_query(inputs)).max() < 1e-6


def test_training_is_refused(tiny):
    from trainers.trainer import SahaTrainer

    with pytest.raises(Gen2EmbedError, match="pooling='phrase' cannot be trained"):
        SahaTrainer(tiny("qwen2_vl", prompt_mode="lens", pooling="phrase"))


def test_a_calibration_is_for_the_pooling_that_it_was_fitted_with(tiny_dir, tmp_path, caplog):
    texts = [f"the number {n} of {n % 7} and {n % 5}" for n in range(120)]
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompt_mode="lens", device="cpu")
    model.calibrate(texts[:60], texts[60:])
    model.save_pretrained(str(tmp_path / "calibrated"))
    other = Gen2Embed(tmp_path / "calibrated", pooling="phrase", device="cpu")
    assert other.calibration is None
    assert "was calibrated with its own prompt, readout, pooling and weights" in caplog.text
    expected = oracle(other, {"text": "a fox"}, "query")
    assert np.abs(other.encode_query(["a fox"])[0] - expected).max() < 1e-5
    other.calibrate(texts[:60], texts[60:])  # fitted anew, on means of phrases
    bulk, single = PrefixEncoder(other).encode_query([{"text": "a fox"}]), other.encode_query(["a fox"])
    assert np.abs(bulk - single).max() < 1e-5
    assert np.abs(single[0] - expected).max() > 1e-2
