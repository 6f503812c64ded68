"""The side of an input, by the names under which LangChain, LlamaIndex, txtai, mteb and model cards pass it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.prompts.strategies import SIDES

TEXTS = ["a red circle", "which of the two is larger?"]
QUERY = ("query", "Query", "search_query", "retrieval.query")
DOCUMENT = ("document", "passage", "corpus", "text", "search_document", "retrieval.passage", "PASSAGE")


def equal(one: Any, other: Any) -> bool:
    return bool(np.abs(np.asarray(one) - np.asarray(other)).max() < 1e-6)


def test_the_known_names() -> None:
    assert {name for name, side in SIDES.items() if side == "query"} == {name.lower() for name in QUERY}
    assert {name for name, side in SIDES.items() if side == "document"} == {name.lower() for name in DOCUMENT}


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_a_name_of_a_side_gives_that_sides_vectors(tiny: Any, family: str) -> None:
    model = tiny(family)
    query, document = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert not equal(query, document)
    for names, want in ((QUERY, query), (DOCUMENT, document)):
        for name in names:
            assert equal(model.encode(TEXTS, prompt_name=name), want), name  # LangChain: encode_kwargs
            assert equal(model.encode(TEXTS, name), want), name
            assert equal(model.encode(TEXTS, task=name), want), name
            # LlamaIndex
            assert equal(model.encode(TEXTS, batch_size=1, prompt_name=name, normalize_embeddings=True), want), name
    assert equal(model.encode(TEXTS[0], prompt_name="query"), query[0])
    assert equal(model.encode(TEXTS), document)  # none said: as before
    # txtai and mteb call these, with a name or without
    assert equal(model.encode_query(TEXTS, prompt_name="query"), query)
    assert equal(model.encode_document(TEXTS, prompt_name="passage"), document)


def test_an_image_has_a_side_too(tiny: Any, pictures: list[Any]) -> None:
    model = tiny("qwen2_vl")
    assert equal(model.encode(pictures[:2], prompt_name="query"), model.encode_query(pictures[:2]))


@pytest.mark.parametrize("name", ["querry", "", "s2p", "clustering", 7, ("query",)])
def test_an_unknown_name_is_refused_with_the_known_ones(tiny: Any, name: Any) -> None:
    model = tiny("qwen2_vl")
    for argument in ("prompt_name", "task"):
        with pytest.raises(ValueError, match=rf"unknown {argument} .*known: query, document, passage"):
            model.encode(TEXTS, **{argument: name})
    with pytest.raises(ValueError, match="unknown task"):
        model.preprocess(TEXTS, task=name)


def test_two_sides_at_once_are_refused(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    with pytest.raises(ValueError, match="prompt_name='passage' is a document's, task='query' is not"):
        model.encode(TEXTS, prompt_name="passage", task="query")
    with pytest.raises(ValueError, match="prompt_name='query' is a query's, task='document' is not"):
        model.encode_document(TEXTS, prompt_name="query")


def test_prompts_of_ones_own_stay_system_prompts_and_say_the_side(tiny_dir: Any) -> None:
    prompts = {"query": "Find it. ", "passage": "Here it is. ", "sts": "Compare. "}
    model = Gen2Embed(tiny_dir("qwen2_vl"), prompts=prompts, device="cpu")
    want = model.encode(TEXTS, prompt="Find it. ", task="query")
    assert equal(model.encode(TEXTS, prompt_name="query"), want)
    assert equal(model.encode_query(TEXTS), want)
    assert equal(
        model.encode(TEXTS, prompt_name="passage"), model.encode(TEXTS, prompt="Here it is. ", task="document")
    )
    assert equal(model.encode(TEXTS, prompt_name="sts"), model.encode(TEXTS, prompt="Compare. "))
    # A prompt goes before the name's; the side stays.
    assert equal(
        model.encode(TEXTS, prompt_name="query", prompt="Look. "), model.encode(TEXTS, prompt="Look. ", task="query")
    )


def test_a_default_prompt_name_says_the_side_where_nothing_else_does(tiny_dir: Any, tiny: Any) -> None:
    """LangChain: model_kwargs={"default_prompt_name": "query"}."""
    model = Gen2Embed(tiny_dir("qwen2_vl"), default_prompt_name="query", device="cpu")
    query, document = tiny("qwen2_vl").encode_query(TEXTS), tiny("qwen2_vl").encode_document(TEXTS)
    assert equal(model.encode(TEXTS), query)
    assert equal(model.encode_document(TEXTS), document)
    assert equal(model.encode(TEXTS, prompt_name="document"), document)
    assert equal(model.encode(TEXTS, task="document"), document)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_processes_are_told_the_side(tiny: Any) -> None:
    """LlamaIndex with parallel_process, LangChain with multi_process."""
    model = tiny("qwen2_vl")
    pool = model.start_multi_process_pool(["cpu"])
    try:
        vectors = model.encode_multi_process(TEXTS, pool, prompt_name="query")
    finally:
        model.stop_multi_process_pool(pool)
    assert np.abs(vectors - model.encode_query(TEXTS)).max() < 1e-5
