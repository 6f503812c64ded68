"""The reranker: scores of an independent forward pass, of plain `CrossEncoder`, one by one and in batches."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from samples import sample_of
from sentence_transformers import CrossEncoder
from tiny_any import ANY
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from gen2embed_mteb.embedder.reranking.generation_model import generation_class
from gen2embed_mteb.embedder.reranking.reranker import Reranker
from gen2embed_mteb.errors import Gen2EmbedError

pytestmark = pytest.mark.slow

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 60), "blue")
TEXTS = [("a red circle", "red"), ("a much longer query about a blue thing, to be padded", "blue")]
PAIRS = [
    *TEXTS,
    ("a red circle", RED),
    (RED, BLUE),
    ({"text": "like this, but blue", "image": RED}, {"text": "blue", "image": BLUE}),
]
"""Text with text, text with image, image with image, and both on both sides."""
QUESTION = (
    "Does the candidate match the query?\nA. Yes, it matches completely.\n"
    "B. No, it matches in part, or not at all.\nAnswer with A or B."
)


def pairs_for(model: Gen2Embed) -> list:
    return PAIRS if model.takes_images else TEXTS


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "internvl"])
def test_scores_are_those_of_a_forward_pass_written_by_hand(tiny, tiny_dir, family):
    model = tiny(family)
    loaded = generation_class(model[0].config)[1].from_pretrained(tiny_dir(family)).eval()
    beginning, end, mark = {
        "llama": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "",
        ),
        "qwen2_vl": (
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "<|vision_start|><|image_pad|><|vision_end|>",
        ),
        "internvl": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<IMG_CONTEXT>\n"),
    }[family]
    processor = model.processor
    tokenizer = getattr(processor, "tokenizer", processor)
    first, second = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    expected = []
    for query, candidate in pairs_for(model):
        said, images = [], []
        for given in (query, candidate):
            side = given if isinstance(given, dict) else {"text" if isinstance(given, str) else "image": given}
            images += [side["image"]] if "image" in side else []
            said.append((mark if "image" in side else "") + side.get("text", ""))
        text = f"{beginning}Query: {said[0]}\n\nCandidate: {said[1]}\n\n{QUESTION}{end}"
        more = {"images": images} if images else {}
        features = processor(text=[text], return_tensors="pt", add_special_tokens=False, **more)
        with torch.no_grad():
            logits = loaded(**features).logits[0, -1]
        expected.append(float(logits[first] - logits[second]))
    assert np.abs(model.reranker().predict(pairs_for(model)) - expected).max() < 1e-5


@pytest.mark.parametrize("family", sample_of([*FAMILIES, *ANY], ["qwen2_vl", "gemma3", "llama"]))
def test_plain_cross_encoder_gives_the_same_scores(tiny, tmp_path, family):
    model = tiny(family)
    reranker = model.reranker()
    ours = reranker.predict(pairs_for(model))
    assert ours.std() > 1e-3
    singles = [reranker.predict(pair) for pair in pairs_for(model)]
    assert np.abs(ours - singles).max() < 1e-5
    reranker.save(str(tmp_path / "reranker"))
    plain = CrossEncoder(str(tmp_path / "reranker"), device="cpu")
    assert type(plain[0]).__module__.startswith("sentence_transformers.")
    assert np.abs(plain.predict(pairs_for(model)) - ours).max() < 1e-5
    query, candidates = "a circle", ["red", "blue", "green"]
    assert [row["corpus_id"] for row in plain.rank(query, candidates)] == [
        row["corpus_id"] for row in reranker.rank(query, candidates)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "internvl"])
def test_the_reranker_shares_every_tensor_and_leaves_the_embedder_alone(tiny, family):
    model = tiny(family)
    before = model.encode_query([text for text, _ in TEXTS])
    template = model.processor.chat_template
    reranker = model.reranker()
    reranker.predict(TEXTS)
    ours = {tensor.data_ptr() for tensor in model[0].model.parameters()}
    theirs = {name: tensor for name, tensor in reranker.named_parameters() if tensor.data_ptr() not in ours}
    assert set(theirs) <= {"0.model.lm_head.weight"}
    assert ours <= {tensor.data_ptr() for tensor in reranker.parameters()}
    assert np.array_equal(model.encode_query([text for text, _ in TEXTS]), before)
    assert model.processor.chat_template == template
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]


def test_both_orders_are_averaged(tiny):
    model = tiny("llama")
    both, one = model.reranker("mcq-both"), model.reranker("mcq")
    other = model.reranker("mcq")
    other[0].processor.chat_template = other._template = both._second_template
    expected = (one.predict(TEXTS) - other.predict(TEXTS)) / 2
    assert np.abs(both.predict(TEXTS) - expected).max() < 1e-6
    assert both.health.answers == 4


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_likelihood_is_that_of_the_candidates_tokens_one_by_one(tiny, tiny_dir, family):
    model = tiny(family)
    loaded = generation_class(model[0].config)[1].from_pretrained(tiny_dir(family)).eval()
    tokenizer = model.tokenizer
    beginning, end = {
        "llama": (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        "qwen2_vl": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    }[family]

    def log_probability(query, candidate):
        text = f"{beginning}{query}{end}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        total = 0.0
        for token in tokenizer(candidate, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                logits = loaded(input_ids=torch.tensor([ids])).logits[0, -1]
            total += float(logits.log_softmax(0)[token])
            ids.append(token)
        return total

    expected = [log_probability(query, candidate) - log_probability("", candidate) for query, candidate in TEXTS]
    reranker = model.reranker("likelihood")
    assert np.abs(reranker.predict(TEXTS) - expected).max() < 1e-4
    assert reranker.health is None
    with pytest.raises(Gen2EmbedError, match="scores the text of a candidate, and this one has no text; choose mcq"):
        reranker.predict([("a", " ")])


def test_likelihood_refuses_images_as_candidates(tiny):
    reranker = tiny("qwen2_vl").reranker("likelihood")
    assert np.isfinite(reranker.predict([(RED, "red")])).all()
    with pytest.raises(Gen2EmbedError, match="this one has an image; choose mcq"):
        reranker.predict([("a", RED)])


def test_the_miniature_does_not_answer_and_says_so_once(caplog):
    model = Gen2Embed("gen2embed-mini", device="cpu")
    reranker = model.reranker()
    with caplog.at_level(logging.WARNING):
        reranker.rank("a red circle", [RED, BLUE])
        reranker.rank("a blue circle", [RED, BLUE])
    said = [record.getMessage() for record in caplog.records if record.name.startswith("gen2embed_mteb")]
    assert len(said) == 1
    assert "framing mcq: the model does not answer: it gives 'A' and 'B' a probability of 0.00" in said[0]
    assert (reranker.health.answers, reranker.health.options) == (2, ("A", "B"))
    assert reranker.health.mass < 0.01


def test_equal_scores_keep_the_order_of_the_candidates(tiny):
    found = tiny("llama").reranker().rank("a", ["b", "c", "b", "c", "b"])
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    for score in set(scores):
        ids = [row["corpus_id"] for row in found if row["score"] == score]
        assert ids == sorted(ids)
    assert len(set(scores)) == 2


def test_scores_are_not_rounded_to_one(tiny):
    reranker = tiny("llama").reranker()
    assert isinstance(reranker.activation_fn, torch.nn.Identity)
    odds = reranker.predict(TEXTS)
    shares = reranker.predict(TEXTS, activation_fn=torch.nn.Sigmoid())
    assert np.allclose(shares, 1 / (1 + np.exp(-odds)), atol=1e-6)


def test_a_pair_that_is_too_long_loses_text_and_never_the_question(tiny_dir):
    model = Gen2Embed(tiny_dir("llama"), device="cpu", max_length=200)
    reranker = model.reranker()
    long = "k z " * 300
    features = reranker.preprocess([("a cat", long), (long, long), ("a", "b")])
    assert features["attention_mask"].sum(dim=1).max() <= 200
    for row in features["input_ids"]:
        assert QUESTION in reranker.tokenizer.decode(row)
    assert "Query: a cat\n\nCandidate: k z k z" in reranker.tokenizer.decode(features["input_ids"][0])
    model.max_seq_length = 20
    with pytest.raises(Gen2EmbedError, match="tokens more than max_seq_length, and no text that could be cut"):
        model.reranker().predict([("a", "b")])


def test_what_is_no_pair_is_refused(tiny):
    reranker = tiny("llama").reranker()
    with pytest.raises(TypeError, match=r"a pair is \(query, candidate\), got tuple"):
        reranker.predict([("a", "b", "c")] * 2)
    with pytest.raises(Gen2EmbedError, match="takes text alone"):
        reranker.predict([("a", RED)])
    assert reranker.predict([]).shape == (0,)


def test_adapters_are_merged_into_what_is_written(tiny_dir, tmp_path):
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    plain = model.reranker().predict(TEXTS)
    new_adapter(model[0].model, ["q_proj", "down_proj"], rank=2, dora=False, dropout=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model[0].model.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.1)
    reranker = model.reranker()
    ours = reranker.predict(TEXTS)
    assert np.abs(ours - plain).max() > 1e-3
    reranker.save(str(tmp_path / "merged"))
    assert np.abs(CrossEncoder(str(tmp_path / "merged"), device="cpu").predict(TEXTS) - ours).max() < 1e-5
    assert np.abs(reranker.predict(TEXTS) - ours).max() == 0


def test_what_stock_modules_cannot_express_is_not_saved(tiny, tmp_path):
    for framing in ("mcq-both", "likelihood"):
        with pytest.raises(Gen2EmbedError, match=f"framing='{framing}' cannot be saved"):
            tiny("llama").reranker(framing).save(str(tmp_path / "no"))
    with pytest.raises(Gen2EmbedError, match="layout='official' cannot be saved"):
        tiny("qwen2_vl", layout="official").reranker().save(str(tmp_path / "no"))
    with pytest.raises(Gen2EmbedError, match="safe_serialization=False would write pickled weights"):
        tiny("llama").reranker().save(str(tmp_path / "no"), safe_serialization=False)
    assert not (tmp_path / "no").exists()


def test_an_unknown_framing_is_refused_before_anything_is_built(tiny):
    with pytest.raises(Gen2EmbedError, match="unknown framing 'abcd'"):
        Reranker(tiny("llama"), "abcd")
