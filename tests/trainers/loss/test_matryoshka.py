"""Matryoshka training against a plain reference: a sum of losses on cut vectors, written out by hand."""

import pytest
import torch
from gradients import assert_same, gradients, picture
from run_loss import fixed_pairs
from torch.nn import functional

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import SahaLoss, UnimeLoss
from trainers.loss.matryoshka import at_widths, check_widths

TAU, WIDTHS, WEIGHTS = 0.02, (32, 16, 5), (1.0, 0.5, 0.25)
EQUAL = [{0, 5}, {2, 6}, {3, 4}]


@pytest.fixture
def model(tiny_dir):
    return Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")


def features_of(model, queries, positives):
    padding = {"text": {"padding_side": "right"}}
    return [
        model.preprocess(column, task=task, processing_kwargs=padding)
        for column, task in ((queries, "query"), (positives, "document"))
    ]


def cosines_of(model, features, width):
    """Of one uncached pass: every query with every candidate, on the first dimensions alone."""
    q, c = (functional.normalize(model(dict(column))["sentence_embedding"][:, :width]) for column in features)
    return q @ c.T


def info_nce(cosines, masked):
    total = torch.zeros(())
    for i in range(len(cosines)):
        kept = [j for j in range(len(cosines)) if j == i or not (masked and {i, j} in EQUAL)]
        scores = cosines[i, kept] / TAU
        total = total - (scores[kept.index(i)] - scores.exp().sum().log())
    return total / len(cosines)


def unime(cosines, beta, k):
    """Each query against its k hardest candidates, repeated up to k, of those that are within beta of its positive."""
    total = torch.zeros(())
    for i in range(len(cosines)):
        others = [j for j in range(len(cosines)) if j != i and {i, j} not in EQUAL]
        left = sorted((j for j in others if cosines[i, j] <= cosines[i, i] + beta), key=lambda j: -cosines[i, j].item())
        if left:
            chosen = [left[:k][place % len(left[:k])] for place in range(k)]
            scores = cosines[i, [i, *chosen]] / TAU
            total = total - torch.log_softmax(scores, dim=0)[0]
    return total / len(cosines)


def summed(model, features, loss):
    return sum(weight * loss(cosines_of(model, features, width)) for width, weight in zip(WIDTHS, WEIGHTS, strict=True))


@pytest.mark.parametrize("masked", [True, False])
def test_saha_loss_at_several_widths_equals_a_sum_of_uncached_losses(model, masked):
    features = features_of(model, *fixed_pairs())
    inner = SahaLoss(model, mini_batch_size=3, mask_equal_positives=masked, share_prefix=True)
    loss = at_widths(model, inner, WIDTHS, WEIGHTS)
    value = loss(features, None)
    expected = summed(model, features, lambda cosines: info_nce(cosines, masked))
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, value), gradients(model, expected))


def test_what_unime_drops_and_chooses_is_decided_in_each_width(model):
    features = features_of(model, *fixed_pairs())
    beta, k = 0.02, 3
    chosen = [cosines_of(model, features, width).detach() for width in WIDTHS]
    dropped = [[(row > row[i] + beta).nonzero().flatten().tolist() for i, row in enumerate(one)] for one in chosen]
    assert dropped[0] != dropped[2]
    loss = at_widths(model, UnimeLoss(model, beta=beta, num_hard_negatives=k, mini_batch_size=3), WIDTHS, WEIGHTS)
    value = loss(features, None)
    expected = summed(model, features, lambda cosines: unime(cosines, beta, k))
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, value), gradients(model, expected))


def test_images_are_still_run_through_the_vision_tower_once(model):
    for name, weight in model.named_parameters():
        weight.requires_grad_("visual" not in name)
    calls = []
    model[0].model.visual.register_forward_hook(lambda *_: calls.append(1))
    features = features_of(model, ["one", "two"], [{"image": picture(1)}, {"image": picture(2)}])
    inner_loss = SahaLoss(model, mini_batch_size=1)
    at_widths(model, inner_loss, WIDTHS)(features, None).backward()
    assert len(calls) == 2


def test_without_gradients_it_gives_the_same_value(model):
    features = features_of(model, ["one", "two"], ["three", "four"])
    loss = at_widths(model, SahaLoss(model), WIDTHS, WEIGHTS)
    with torch.no_grad():
        value = loss(features, None)
    torch.testing.assert_close(value, loss(features, None).detach())


@pytest.mark.parametrize(
    ("dims", "weights", "message"),
    [
        ((64, 0), (), "has 0"),
        ((64, 64), (), "64 comes after 64"),
        ((16, 32), (), "32 comes after 16"),
        ((33,), (), "33, but vectors of the model have 32"),
        ((32, 16), (1.0,), "has 1 numbers and matryoshka_dims 2"),
        ((32, 16), (1.0, 0.0), "has 0.0"),
        ((32, 16), (1.0, float("nan")), "finite"),
        ((), (1.0,), "without matryoshka_dims"),
    ],
)
def test_widths_that_make_no_sense_are_refused(dims, weights, message):
    with pytest.raises(Gen2EmbedError, match=message):
        check_widths(dims, weights, 32)
