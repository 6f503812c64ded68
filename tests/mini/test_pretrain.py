"""Training of the mini model: what the loss sees, and that its shortcuts change nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from gen2embed_mteb.embedder.model_folder import compat
from gen2embed_mteb.mini import corpus, model_dir, pretrain

pytestmark = pytest.mark.slow

NO_DIGITS = (np.zeros((0, 64, 64, 3), np.uint8), np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def album():
    return corpus.Album(np.random.default_rng(0), 12, NO_DIGITS)


@pytest.fixture(scope="module")
def processor():
    compat.install()
    return AutoProcessor.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def collate(processor):
    return pretrain.Collator(processor.tokenizer, processor.image_processor)


@pytest.fixture(scope="module")
def batch(album):
    rng = np.random.default_rng(5)
    return [make(rng, album) for make in pretrain.LESSONS.values() for _ in range(8)]


def test_only_the_answer_and_its_end_are_predicted(collate, batch):
    features = collate(batch)
    tokenizer = collate.tokenizer
    for row, example in enumerate(batch):
        labelled = features["labels"][row] != -100
        assert tokenizer.decode(features["labels"][row][labelled]) == f"{example.answer}<|im_end|>"
        assert (features["labels"][row][labelled] == features["input_ids"][row][labelled]).all()


def test_the_collator_writes_what_the_processor_writes(collate, processor, batch):
    with_image = next(example for example in batch if example.pixels is not None and example.system)
    features = collate([with_image])
    messages = [
        {"role": "system", "content": with_image.system},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": with_image.user}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    from PIL import Image

    stock = processor(text=[text], images=[Image.fromarray(with_image.pixels)], return_tensors="pt")
    length = stock["input_ids"].shape[1]
    assert (features["input_ids"][:, :length] == stock["input_ids"]).all()
    assert (features["mm_token_type_ids"][:, :length] == stock["mm_token_type_ids"]).all()
    assert (features["image_grid_thw"] == stock["image_grid_thw"]).all()
    assert (features["pixel_values"] - stock["pixel_values"]).abs().max() < 2**-7  # kept as bfloat16


def test_the_loss_is_the_models_own_next_token_loss(collate, batch):
    torch.manual_seed(0)
    model = pretrain.build_model(pretrain.PretrainConfig(), collate.tokenizer)
    features = collate(batch)
    # transformers averages over all labelled tokens of the batch, as ours does.
    with torch.no_grad():
        stock = model(**features).loss
        pretrain.batch_vision_attention(model)
        ours = pretrain.next_token_loss(model, features)
    assert abs(stock.item() - ours.item()) < 1e-5


@pytest.mark.exhaustive
def test_a_short_run_is_deterministic_and_writes_the_hubs_layout(tmp_path):
    plan = pretrain.Round((("first_lesson", 8),), 2, 1e-3, 16, 8.0)
    config = pretrain.PretrainConfig(rounds=(plan, replace(plan, rope_theta=100.0)), num_pictures=8)
    for name in ("a", "b"):
        pretrain.train(config, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "pretrain.json",
    }
