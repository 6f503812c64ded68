"""The query's part computed once: scores of the plain forward pass, tokens counted, and when it is not shared."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import sample_of
from tiny_any import ANY
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.reranking.framings import FRAMINGS
from gen2embed_mteb.embedder.reranking.query_scorer import QueryScorer
from gen2embed_mteb.errors import Gen2EmbedError

TEXTS: list[Any] = ["red", "a green thing, said at some length, with a comma", "a", "red", "", "\n x", "blue\n"]


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(3)
    sizes = [(64, 64), (90, 60), (64, 64), (40, 100)][:count]
    return [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def cases(model: Gen2Embed, framing: str) -> list[tuple[Any, list[Any]]]:
    """Queries and candidates: texts, images and both on either side, images of equal sizes among them."""
    texts = [text for text in TEXTS if text.strip()] if framing == "likelihood" else TEXTS
    found: list[tuple[Any, list[Any]]] = [("a red circle, or what?", texts), ("x", texts[:1])]
    if model.takes_images:
        one, two, three, four = pictures(4)
        both = {"text": "<|image_1|>\nlike this,\nbut blue\n", "image": one}
        found += [(one, texts), (both, texts)]
        if framing != "likelihood":
            mixed = [two, {"text": "<|image_1|>\nit is blue", "image": three}, "text alone", four, three]
            found += [("a red circle", mixed), (both, mixed), ({"text": "two of them", "image": [one, two]}, [three])]
    return found


LIKELIHOOD_LIMIT = 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", sample_of([*FAMILIES, *ANY], ["qwen2_vl"]))
def test_scores_are_those_of_the_plain_forward_pass(tiny: Any, family: str) -> None:
    model = tiny(family)
    for framing in ("mcq", "mcq-both", "likelihood"):
        reranker = model.reranker(framing)
        scorer = QueryScorer(reranker, batch_tokens=300)
        for query, candidates in cases(model, framing):
            plain = reranker.predict([(query, candidate) for candidate in candidates])
            found = scorer.score(query, candidates)
            # A likelihood is a difference of sums of some hundred: numbers of float32 are 8e-6 to 3e-5 apart there.
            limit = LIKELIHOOD_LIMIT if framing == "likelihood" else 1e-5
            assert np.abs(found.scores - plain).max() < limit * max(1.0, float(np.abs(plain).max()))
            assert found.num_tokens <= found.num_tokens_in_full
            if framing == "likelihood":
                assert found.options.shape == (len(candidates), 0, 2)
            else:
                mass, share = found.options.sum(axis=2).mean(), (found.options[..., 0] > found.options[..., 1]).mean()
                health = reranker.health
                assert abs(mass - health.mass) < 1e-5 and abs(share - health.share) < 1e-6
    assert scorer.reuses_query


@pytest.mark.parametrize("framing", list(FRAMINGS))
def test_the_query_is_run_once_and_tokens_are_counted(tiny: Any, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of tokens that went through the model, counted at the model itself."""
    model = tiny("qwen2_vl")
    reranker = model.reranker(framing)
    query = {"text": "What is it?", "image": pictures(1)[0].resize((280, 280))}
    candidates = ["red", "a green thing, said at some length", "blue"]
    seen: list[int] = []

    stock = type(reranker[0].model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        seen.append(ids.numel() if mask is None else int(mask[:, mask.shape[1] - ids.shape[1] :].sum()))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(reranker[0].model), "forward", forward)
    plain = reranker.predict([(query, candidate) for candidate in candidates])
    in_full = sum(seen)
    scorer = QueryScorer(reranker)
    scorer.score("a", ["b"])  # runs what is shared among queries
    seen.clear()
    found = scorer.score(query, candidates)
    assert np.abs(found.scores - plain).max() < (LIKELIHOOD_LIMIT if framing == "likelihood" else 1e-5)
    assert found.num_tokens == sum(seen)
    assert found.num_tokens_in_full == in_full
    assert found.num_tokens < 0.7 * in_full


def test_images_of_the_query_are_prepared_once_for_texts(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen2_vl")
    scorer = QueryScorer(model.reranker())
    prepared: list[int] = []
    processor = type(scorer.reranker[0].processor.image_processor)
    stock = processor.preprocess
    monkeypatch.setattr(
        processor, "preprocess", lambda self, images, *a, **k: prepared.append(1) or stock(self, images, *a, **k)
    )
    scorer.score(pictures(1)[0], ["red", "blue", "green"])
    assert len(prepared) == 1


def test_a_query_that_must_be_cut_runs_in_full(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("llama"), device="cpu", max_length=200)
    for framing in ("mcq", "likelihood"):
        reranker = model.reranker(framing)
        long = "k z " * 300
        for query, candidates in ((long, ["a", "b c"]), ("a", [long[:80], "b"])):
            if framing == "likelihood" and query == long:
                continue  # both cut the prompt, each to the room that its longest answer leaves
            found = QueryScorer(reranker).score(query, candidates)
            assert np.abs(found.scores - reranker.predict([(query, one) for one in candidates])).max() < 1e-5
    found = QueryScorer(model.reranker()).score(long, ["a", "b c"])
    assert found.num_tokens == found.num_tokens_in_full


def test_a_family_that_goes_on_wrongly_from_a_cache_runs_in_full(
    tiny_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    reranker = model.reranker()

    def shift(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        wrong = 0.05 if cache is not None and cache.get_seq_length() > 0 else 0.0
        kwargs["inputs_embeds"] = model[0].model.get_input_embeddings()(kwargs.pop("input_ids")) + wrong
        return args, kwargs

    model[0].model.register_forward_pre_hook(shift, with_kwargs=True)
    scorer = QueryScorer(reranker)
    with caplog.at_level(logging.WARNING):
        found = scorer.score("a", ["b", "c d"])
    assert not scorer.reuses_query
    assert any("if the query's part is shared; every pair now runs in full" in line for line in caplog.messages)
    assert found.num_tokens == found.num_tokens_in_full
    assert np.abs(found.scores - reranker.predict([("a", "b"), ("a", "c d")])).max() < 1e-6


def test_it_can_be_switched_off(tiny: Any) -> None:
    found = QueryScorer(tiny("llama").reranker(), reuse_query=False).score("a", ["b", "c"])
    assert found.num_tokens == found.num_tokens_in_full


def test_equal_texts_have_equal_scores_and_faults_are_those_of_predict(tiny: Any) -> None:
    scorer = QueryScorer(tiny("qwen2_vl").reranker("likelihood"))
    scores = scorer.score("a", ["b", "c d e", "b"]).scores
    assert scores[0] == scores[2] != scores[1]
    with pytest.raises(Gen2EmbedError, match="this one has an image; choose mcq"):
        scorer.score("a", [pictures(1)[0]])


def test_a_prompt_is_the_system_turn_as_in_predict(tiny: Any) -> None:
    reranker = tiny("qwen2_vl").reranker()
    candidates = ["b", "c d e"]
    told = QueryScorer(reranker).score("a", candidates, "Find the opposite.").scores
    assert np.abs(told - reranker.predict([("a", one) for one in candidates], prompt="Find the opposite.")).max() < 1e-5
    assert np.abs(told - QueryScorer(reranker).score("a", candidates).scores).max() > 1e-4


def test_rank_shares_the_query_and_gives_what_the_stock_method_gives(tiny: Any) -> None:
    reranker = tiny("qwen2_vl").reranker()
    candidates = ["red", "blue", "red", *pictures(2)]
    found = reranker.rank("a", candidates, return_documents=True)
    assert reranker.health.answers == 5
    stock = super(type(reranker), reranker).rank("a", candidates, return_documents=True)
    assert [row["corpus_id"] for row in found] == [row["corpus_id"] for row in stock]
    assert [row["text"] for row in found] == [row["text"] for row in stock]
    assert np.allclose([row["score"] for row in found], [row["score"] for row in stock], atol=1e-5)
    best = reranker.rank("a", candidates, top_k=2, activation_fn=torch.nn.Sigmoid())
    assert [row["corpus_id"] for row in best] == [row["corpus_id"] for row in found[:2]]
    assert best[0]["score"] == pytest.approx(1 / (1 + np.exp(-found[0]["score"])), abs=1e-6)
    assert reranker.rank("a", []) == []
