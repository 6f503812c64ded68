"""A frozen vision tower is run once a step, and the gradients are those of running it twice."""

import pytest
import torch
from gradients import gradients, picture
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.families import FAMILIES
from trainers import SahaLoss
from trainers.loss.image_reuse import has_frozen_vision


def features_of(model):
    """Five pairs in mini-batches of two: a text alone, images alone, images with text, both sides."""
    queries = ["a text", {"image": picture(1)}, {"text": "find it", "image": picture(2)}, "another", "a third one"]
    positives = [{"image": picture(3)}, "a caption", "of several words, this", {"image": picture(4)}, "end"]
    padding = {"text": {"padding_side": "right"}}
    return [
        model.preprocess(column, task=task, processing_kwargs=padding)
        for column, task in ((queries, "query"), (positives, "document"))
    ]


TOWERS = ("visual", "vision_tower", "vision_embed_tokens")


@pytest.fixture(params=FAMILIES)
def model(request, tiny_dir):
    model = Gen2Embed(tiny_dir(request.param), device="cpu").train()
    inner = model[0].model
    inner.requires_grad_(False)
    inner.language_model.requires_grad_(True)
    return model


def count_runs(model):
    """How often images were put through the model's own method."""
    calls = []
    inner = model[0].model
    tower = next(module for name, module in inner.named_children() if name in TOWERS)
    tower.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_gradients_and_runs_of_the_tower(model):
    stock = CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=2)
    expected = gradients(model, stock(features_of(model), None))
    calls = count_runs(model)
    value = SahaLoss(model, mini_batch_size=2)(features_of(model))
    with_images = len(calls)
    found = gradients(model, value)
    assert with_images == 4  # of six mini-batches: rows 0-1 and 2-3 of either side
    assert len(calls) == with_images
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name
    assert "get_image_features" not in vars(model[0].model)


def test_a_trained_tower_is_run_twice(model):
    inner = model[0].model
    assert has_frozen_vision(inner)
    inner.requires_grad_(True)
    assert not has_frozen_vision(inner)
    calls = count_runs(model)
    SahaLoss(model, mini_batch_size=2)(features_of(model)).backward()
    assert len(calls) == 8
    assert any(
        weight.grad is not None and weight.grad.any() for name, weight in inner.named_parameters() if "vis" in name
    )


def test_switched_off(model):
    calls = count_runs(model)
    loss = SahaLoss(model, mini_batch_size=2, reuse_image_features=False)
    loss(features_of(model)).backward()
    assert len(calls) == 8


def test_random_numbers_outside_the_language_model_forbid_it(model):
    inner = model[0].model
    inner.add_module("extra", torch.nn.Dropout(0.1))
    assert not has_frozen_vision(inner)


def test_two_steps_before_their_backward_passes_do_not_mix(model):
    loss = SahaLoss(model, mini_batch_size=2)
    first = features_of(model)
    swapped = [first[1], first[0]]
    expected = [gradients(model, loss(columns)) for columns in (first, swapped)]
    values = [loss(columns) for columns in (first, swapped)]
    for value, gradient in zip(values, expected, strict=True):
        found = gradients(model, value)
        assert all(torch.equal(found[name], gradient[name]) for name in gradient)


def test_evaluation_keeps_nothing(model):
    calls = count_runs(model)
    loss = SahaLoss(model, mini_batch_size=2)
    with torch.no_grad():
        loss(features_of(model))
        loss(features_of(model))
    assert len(calls) == 8
