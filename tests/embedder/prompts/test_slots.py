"""The table of slots: every dataset of the two benchmarks is in it, and its words can stand in a sentence."""

from __future__ import annotations

import pytest

from gen2embed_mteb.embedder.prompts.slots import DEFAULT_SLOTS, MINI_SLOTS, MMEB_SLOTS, SLOTS, TaskSlots, known_slots
from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES, dataset_prompt_name, prompts_of_datasets
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb.datasets import MMEB


def test_every_dataset_has_slots():
    assert len(MMEB.names) == 36
    trained = {dataset.train_name for dataset in MMEB.datasets if dataset.train_name}
    assert set(MMEB_SLOTS) == {*MMEB.names, *trained}
    assert set(MINI_SLOTS) == set(MMEB_MINI.names)
    assert len(SLOTS) == len(MMEB_SLOTS) + len(MINI_SLOTS)  # no name stands for two datasets
    for dataset in MMEB.datasets:
        if dataset.train_name:
            assert SLOTS[dataset.train_name] == SLOTS[dataset.name]


@pytest.mark.parametrize("dataset", SLOTS)
def test_slots_are_nouns_with_an_article_on_one_line(dataset):
    slots = SLOTS[dataset]
    for words in (slots.query, slots.target):
        assert words.split()[0] in ("a", "an", "the"), words
    assert slots.aspect.split()[0] in ("the", "what", "whether"), slots.aspect
    for words in (slots.query, slots.target, slots.aspect):
        assert words == words.strip()
        assert words.isascii()
        assert not set(words) & set("{}.<>\n")


def test_candidates_that_are_encoded_as_queries_are_of_the_same_kind():
    """They get the prompt of queries, which must then fit both sides."""
    for benchmark in (MMEB, MMEB_MINI):
        for dataset in benchmark.datasets:
            if dataset.candidates_as_queries:
                assert SLOTS[dataset.name].query == SLOTS[dataset.name].target


def test_the_two_directions_of_a_dataset_exchange_query_and_target():
    for name in ("VisualNews", "MSCOCO", "Scenes"):
        there, back = SLOTS[f"{name}_t2i"], SLOTS[f"{name}_i2t"]
        assert (there.query, there.target, there.aspect) == (back.target, back.query, back.aspect)


def test_only_the_strategies_per_task_have_prompts_of_datasets():
    for name, prompt in STRATEGIES.items():
        found = prompts_of_datasets(prompt)
        expected = {dataset_prompt_name(dataset, side) for dataset in SLOTS for side in ("query", "document")}
        assert set(found) == (expected if name in ("freeret", "lens") else set())
        assert len(set(found.values())) > 40 or not found


@pytest.mark.parametrize("fault", ["", "  ", "a\nphoto", None, 3, "a\u2028b"])
def test_a_slot_that_cannot_stand_in_a_sentence_is_refused(fault):
    with pytest.raises(Gen2EmbedError, match="slot aspect is"):
        TaskSlots("a photo", "an answer", fault)
    assert TaskSlots("an input", "a candidate", "the meaning") == DEFAULT_SLOTS


def test_a_dataset_is_found_in_any_case_and_a_wrong_name_gets_a_hint():
    assert known_slots("n24news") == SLOTS["N24News"]
    with pytest.raises(Gen2EmbedError, match="did you mean 'N24News'"):
        known_slots("N24New")
