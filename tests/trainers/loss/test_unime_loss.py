"""UniME's second loss against a slow reference, row by row; and what happens to starved rows."""

import math

import pytest
import torch
from gradients import assert_same, gradients
from run_loss import fixed_pairs
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import UnimeLoss
from trainers.loss.saha_loss import float32_cosine

TAU = 0.02


@pytest.fixture
def model(tiny_dir):
    return Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")


def chosen(row, own, beta, k, among):
    """The negatives of one query by the paper's rule: a list of k columns, or an empty one."""
    left = [j for j in among if j != own and row[j] <= row[own] + beta]
    left.sort(key=lambda j: -row[j])
    kept = left[:k]
    return [kept[place % len(kept)] for place in range(k)] if kept else []


def reference(model, features, beta, k, equal=lambda i, j: False):
    """The mean over queries of -log(e^(p/t) / (e^(p/t) + sum of e^(n/t) over the negatives)), from single passes."""
    q, *columns = (torch.nn.functional.normalize(model(column)["sentence_embedding"]) for column in features)
    c, total = torch.cat(columns), torch.zeros(())
    for i in range(len(q)):
        row = (c @ q[i]).detach().tolist()
        negatives = chosen(row, i, beta, k, [j for j in range(len(c)) if not equal(i, j)])
        scores = torch.stack([q[i] @ c[j] for j in (i, *negatives)]).double() / TAU
        total = total - (scores[0] - scores.exp().sum().log()).float()
    return total / len(q)


def texts():
    queries = [f"query {number}, of some words" for number in range(7)]
    return queries, ["dog", "cat", "a lamp", "a much longer positive than the others are", "owl", "cow", "one two"]


def features_of(model, *columns):
    padding = {"text": {"padding_side": "right"}}
    return [
        model.preprocess(column, task="document" if number else "query", processing_kwargs=padding)
        for number, column in enumerate(columns)
    ]


@pytest.mark.parametrize(("beta", "k"), [(0.1, 3), (0.0, 3), (-0.05, 2), (0.001, 8)])
def test_value_and_gradients_equal_a_plain_reference(model, beta, k):
    features = features_of(model, *texts())
    value = UnimeLoss(model, beta=beta, num_hard_negatives=k, mini_batch_size=3)(features)
    expected = reference(model, features, beta, k)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, value), gradients(model, expected))


def test_with_images_equal_positives_and_further_negatives(model):
    queries, positives = fixed_pairs()
    negatives = [*positives[1:], {"text": "an owl"}]
    same = {frozenset(pair) for pair in ((0, 5), (2, 6), (3, 4))}

    def equal(i, j):
        one = j if j < 8 else j - 7  # the negatives are the positives but for the first, and an owl
        return j != i and (one == i or frozenset((i, one)) in same) and one < 8

    features = features_of(model, queries, positives, negatives)
    value = UnimeLoss(model, num_hard_negatives=4, mini_batch_size=4)(features)
    expected = reference(model, features, 0.1, 4, equal)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, value), gradients(model, expected))


def test_with_all_candidates_it_is_infonce(model):
    features = features_of(model, *texts())
    ours = UnimeLoss(model, beta=3, num_hard_negatives=6, mini_batch_size=3, share_prefix=False)
    stock = CachedMultipleNegativesRankingLoss(model, scale=1 / TAU, mini_batch_size=3)
    assert_same(gradients(model, ours(features)), gradients(model, stock(features, None)))


ROW = [0.5, 0.7, 0.55, 0.3, 0.9, 0.1]
"""Similarities of one query; the first is its positive. With beta = 0.1, columns 1 and 4 are false negatives."""


def loss_of(model, row, **options):
    loss = UnimeLoss(model, scale=1.0, **options)
    cosines = torch.tensor([row], requires_grad=True)
    value = loss.per_query(cosines, torch.tensor([0]))
    value.sum().backward()
    return value.item(), cosines.grad[0].tolist()


def test_by_hand_false_negatives_are_dropped_and_the_hardest_taken(model):
    value, gradient = loss_of(model, ROW, beta=0.1, num_hard_negatives=2)
    terms = [math.exp(0.5), math.exp(0.55), math.exp(0.3)]
    assert value == pytest.approx(-math.log(terms[0] / sum(terms)), rel=1e-6)
    expected = [terms[0] / sum(terms) - 1, 0, terms[1] / sum(terms), terms[2] / sum(terms), 0, 0]
    assert gradient == pytest.approx(expected, abs=1e-6)


def test_by_hand_too_few_are_repeated_the_hardest_first(model):
    """Columns 2, 3 and 5 are left for k = 5: 2 and 3 count twice, 5 once."""
    value, _ = loss_of(model, ROW, beta=0.1, num_hard_negatives=5)
    below = math.exp(0.5) + 2 * math.exp(0.55) + 2 * math.exp(0.3) + math.exp(0.1)
    assert value == pytest.approx(-math.log(math.exp(0.5) / below), rel=1e-6)


def test_by_hand_with_none_left_there_is_no_loss_and_no_gradient(model):
    value, gradient = loss_of(model, [0.2, 0.9, 0.8, 0.7], beta=0.1, num_hard_negatives=2)
    assert value == 0
    assert gradient == [0, 0, 0, 0]


def test_by_hand_the_published_code_fills_up_with_what_was_dropped(model):
    """One candidate is left for k = 4: both dropped ones join it, and the positive is its own negative."""
    value, _ = loss_of(model, [0.2, 0.9, 0.8, 0.1], beta=0.1, num_hard_negatives=4, variant="official")
    below = 2 * math.exp(0.2) + math.exp(0.9) + math.exp(0.8) + math.exp(0.1)
    assert value == pytest.approx(-math.log(math.exp(0.2) / below), rel=1e-6)
    starved = [0.2, 0.9, 0.8, 0.7]
    assert loss_of(model, starved, num_hard_negatives=4, variant="official")[0] > 1
    assert loss_of(model, starved, num_hard_negatives=4)[0] == 0


def test_both_variants_agree_where_enough_are_left(model):
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(5, 40, generator=generator) - 0.5
    own = torch.arange(5)
    values = [
        UnimeLoss(model, num_hard_negatives=4, beta=0.4, variant=variant).per_query(cosines, own)
        for variant in ("paper", "official")
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": math.nan}, "beta is nan; pass a finite number"),
        ({"num_hard_negatives": 0}, "num_hard_negatives is 0; pass 1 or more"),
        ({"variant": "code"}, "variant is 'code'; known: paper, official"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(model, options, said):
    with pytest.raises(Gen2EmbedError, match=said):
        UnimeLoss(model, **options)


def test_the_published_code_needs_k_candidates(model):
    with pytest.raises(Gen2EmbedError, match="num_hard_negatives is 8, but the batch has 6 candidates"):
        loss_of(model, ROW, variant="official")


def test_its_settings_are_in_the_model_card(model):
    found = UnimeLoss(model, beta=0.2, num_hard_negatives=5, variant="official").get_config_dict()
    assert (found["beta"], found["num_hard_negatives"], found["variant"]) == (0.2, 5, "official")
    assert found["similarity_fct"] == float32_cosine.__name__
    assert found["scale"] == pytest.approx(50)
