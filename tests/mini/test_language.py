"""The mini world's English: captions say what is there, and the prompt's own sentences are never said."""

import re

import numpy as np
import pytest

from gen2embed_mteb.embedder.prompts import strategies as prompts
from gen2embed_mteb.mini import language, pretrain
from gen2embed_mteb.mini.world import COLORS, SHAPES, random_scene


def test_a_caption_mentions_each_attribute_once():
    rng = np.random.default_rng(0)
    for num_things in (1, 2):
        for _ in range(300):
            scene = random_scene(rng, num_things)
            words = re.findall(r"[a-z]+", language.caption(rng, scene).lower())
            for attribute in language.caption_words(scene):
                assert words.count(attribute) == 1, (scene, words)


def test_captions_of_one_scene_differ_in_wording():
    rng = np.random.default_rng(0)
    scene = random_scene(rng)
    assert len({language.caption(rng, scene) for _ in range(50)}) > 10


def test_a_question_is_answered_by_the_scene():
    rng = np.random.default_rng(0)
    for num_things in (1, 2):
        for _ in range(300):
            scene = random_scene(rng, num_things)
            _, words, sentence = language.question(rng, scene)
            assert set(words) <= set(scene.attributes)
            assert words[0] in re.findall(r"[a-z]+", sentence)


def test_a_pair_question_never_fits_both_things():
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = random_scene(rng, 2)
        text, (answer,), _ = language.question(rng, scene)
        named = [t for t in scene.things if {t.shape, t.color, t.place} & set(re.findall(r"[a-z]+", text))]
        assert len(named) == 1
        assert answer in (named[0].shape, named[0].color)


def test_a_change_changes_exactly_one_attribute():
    rng = np.random.default_rng(0)
    for _ in range(200):
        thing = random_scene(rng).things[0]
        text, changed = language.change(rng, thing, list(COLORS), SHAPES)
        differing = [f for f in ("shape", "color", "place", "size") if getattr(thing, f) != getattr(changed, f)]
        assert len(differing) == 1
        assert getattr(changed, differing[0]) in text


def prompt_sentences():
    """Every sentence of the paper's strategies and of E5-V's, without its leading newline and closing mark."""
    for name in (*prompts.TABLE_IV, "e5-v"):
        prompt = prompts.STRATEGIES[name]
        for text in (prompt.query_system, prompt.query_text, prompt.query_image, prompt.document_image):
            for sentence in re.split(r"(?<=\.)\s+", text.strip()):
                if sentence and "word" in sentence:
                    yield sentence.strip().rstrip(".: ").lower()


def test_the_held_out_list_covers_every_instruction_of_every_strategy():
    sentences = set(prompt_sentences())
    assert len(sentences) >= 6
    for sentence in sentences:
        assert language.is_held_out(sentence), sentence


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_system_prompt_and_the_representation_prompts_are_nowhere_in_the_training_text():
    """Every conversation that the model in the tree was trained on, in order; the tokenizer's text as well."""
    config, sentences = pretrain.PretrainConfig(), set(prompt_sentences())
    texts = list(pretrain.training_text(config, 20_000))
    for _, batches in pretrain.training_batches(config):
        texts += [f"{c.system or ''}\n{c.user}\n{c.answer}" for batch in batches for c in batch]
    steps = [(plan.batch_size, sum(count for _, count in plan.lessons)) for plan in config.rounds]
    assert len(texts) == 20_000 + sum(size * count for size, count in steps)
    text = "\n".join(texts).lower()
    assert [sentence for sentence in sentences if sentence in text] == []  # a list: pytest would diff the whole text
    # The words are known, though: the prompt is new as a sentence, not as vocabulary.
    for word in re.findall(r"[a-z]+", prompts.SYSTEM.lower()):
        assert re.search(rf"\b{word}\b", text), word


@pytest.mark.parametrize("has_image", [False, True])
def test_one_word_grammars_refuse_the_held_out_sentences_for_every_draw(has_image):
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        assert not language.is_held_out(language.one_word_system(rng))
        assert not language.is_held_out(language.one_word_user(rng, has_image))
