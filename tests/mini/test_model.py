"""`gen2embed-mini` as it is in the tree: small, a real generator, and an embedder only by its prompt."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder import compat
from gen2embed_mteb.mini import language, model_dir
from gen2embed_mteb.mini.pretrain import SPECIAL_TOKENS, PretrainConfig
from gen2embed_mteb.mini.world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, draw, random_scene

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def processor():
    compat.install()
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def generator():
    return Qwen2VLForConditionalGeneration.from_pretrained(model_dir()).eval()


@pytest.fixture(scope="module")
def pictures():
    """Scenes that training never drew: another stream."""
    rng = np.random.default_rng(20_261)
    scenes = [random_scene(rng) for _ in range(100)]
    return [(scene, Image.fromarray(draw(scene, rng))) for scene in scenes]


def generate(generator, processor, pictures, text, system=None):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt] * len(pictures), images=[image for _, image in pictures], return_tensors="pt")
    with torch.no_grad():
        output = generator.generate(**inputs, max_new_tokens=40)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_is_a_small_qwen2_vl_in_the_hubs_layout(generator, processor):
    assert sum(parameter.numel() for parameter in generator.parameters()) <= 6_000_000
    assert sum(path.stat().st_size for path in model_dir().iterdir()) <= 12 * MEGABYTE
    config = json.loads((model_dir() / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert not list(model_dir().glob("*.bin"))
    for token in SPECIAL_TOKENS:
        assert processor.tokenizer.encode(token) == [processor.tokenizer.convert_tokens_to_ids(token)]
    text = "Any bytes: é 語 🙂 \x00"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


QUESTIONS = {"color": "What color is the object?", "shape": "What shape is it?", "place": "Where is the object?"}


@pytest.mark.parametrize(("attribute", "least"), [("color", 0.95), ("shape", 0.85), ("place", 0.95)])
def test_it_answers_questions_in_a_word(generator, processor, pictures, attribute, least):
    """Shape is the hardest of them, small ones above all."""
    answers = generate(generator, processor, pictures, f"{QUESTIONS[attribute]} Answer in one word.")
    expected = [getattr(scene.things[0], attribute) for scene, _ in pictures]
    assert np.mean([answer.strip() == word for answer, word in zip(answers, expected, strict=True)]) >= least


def test_it_writes_captions_that_say_what_is_there(generator, processor, pictures):
    captions = generate(generator, processor, pictures, "")
    known = {*SHAPES, *COLORS, *PLACES, *SIZES, *BACKGROUNDS}
    precision, recall = [], []
    for caption, (scene, _) in zip(captions, pictures, strict=True):
        assert caption.rstrip().endswith(".")
        said = set(re.findall(r"[a-z]+", caption.lower())) & known
        precision.append(len(said & set(scene.attributes)) / max(1, len(said)))
        recall.append(len(said & set(scene.attributes)) / len(scene.attributes))
    assert np.mean(precision) >= 0.9
    assert np.mean(recall) >= 0.8


@pytest.mark.slow
def test_the_prompt_makes_it_an_embedder(pictures):
    """Image to caption, one of a hundred: the paper's effect in miniature (Table IV)."""
    rng = np.random.default_rng(1)
    captions = [{"text": language.caption(rng, scene)} for scene, _ in pictures]
    images = [{"image": image} for _, image in pictures]
    precision = {}
    for mode in ("none", "system", "hierarchical"):
        model = Gen2Embed("gen2embed-mini", prompt_mode=mode)
        scores = model.encode_query(images) @ model.encode_document(captions).T
        precision[mode] = float(np.mean(scores.argmax(axis=1) == np.arange(len(pictures))))
    assert precision["hierarchical"] >= 0.4
    assert precision["system"] >= 2.5 * precision["none"]
    assert precision["hierarchical"] >= 3 * precision["none"]


def test_the_training_record_names_its_command_and_versions():
    record = json.loads((model_dir() / "pretrain.json").read_text())
    assert record["command"].startswith("python -m gen2embed_mteb.mini.pretrain")
    assert record["rounds_done"] == len(record["config"]["rounds"]) == len(PretrainConfig().rounds)
    assert {"torch", "transformers"} <= set(record["versions"])
