"""The loss of stage 1 against a plain reference, and the facts that its defaults rest on."""

import math

import numpy as np
import pytest
import torch
from gradients import assert_same, gradients

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.errors import Gen2EmbedError
from trainers.distillation.loss import DistillationLoss

TEXTS = [f"text number {number}, of {'some ' * (number % 3)}words" for number in range(8)]
VECTORS = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)


@pytest.fixture
def model(tiny_dir):
    return Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")


def features_of(model, texts):
    return model.preprocess(texts, task="query", processing_kwargs={"text": {"padding_side": "right"}})


def softmax(row):
    weights = [math.exp(score - max(row)) for score in row]
    return [weight / sum(weights) for weight in weights]


def divergence(first, second):
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(first, second, strict=True) if p > 0)


def reference(students, numbers, tau, direction, diagonal):
    """The mean over texts, row by row and in float64; differentiable in `students`, (n, d) tensor."""
    s = torch.nn.functional.normalize(students.double())
    t = torch.nn.functional.normalize(torch.from_numpy(VECTORS[numbers]).double())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(s)):
        kept = [j for j in range(len(s)) if diagonal or numbers[j] != numbers[i]]
        if kept:
            q, p = ((one[i] @ one[kept].T / tau).softmax(dim=0) for one in (s, t))
            first, second = (p, q) if direction == "teacher-student" else (q, p)
            total = total + (first * (first.log() - second.log())).sum()
    return (total / len(s)).float()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("direction", ["teacher-student", "student-teacher"])
@pytest.mark.parametrize("columns", [1, 2])
def test_value_and_gradients_equal_a_plain_reference(model, columns, direction, diagonal):
    loss = DistillationLoss(model, VECTORS, tau=0.2, direction=direction, diagonal=diagonal, mini_batch_size=3)
    parts = np.split(np.arange(8), columns)
    features = [features_of(model, [TEXTS[number] for number in part]) for part in parts]
    value = loss(features, torch.tensor(np.stack(parts, axis=1).squeeze()))
    students = torch.cat([model(column)["sentence_embedding"] for column in features])
    expected = reference(students, np.arange(8), 0.2, direction, diagonal)
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, value), gradients(model, expected))


def test_by_hand_for_three_texts(model):
    """Unit vectors at angles: the similarities are cosines that can be written down."""
    students = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    teacher = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    loss = DistillationLoss(model, teacher, tau=0.5)
    value = loss.calculate_loss([[students]], torch.arange(3)[:, None])
    rows = [(softmax([0, 1.2]), softmax([1.2, 0])), (softmax([0, 1.6]), softmax([1.2, 1.6]))]
    rows += [(softmax([1.2, 1.6]), softmax([0, 1.6]))]
    assert float(value) == pytest.approx(sum(divergence(p, q) for p, q in rows) / 3, rel=1e-5)
    swapped = DistillationLoss(model, teacher, tau=0.5, direction="student-teacher")
    value = swapped.calculate_loss([[students]], torch.arange(3)[:, None])
    assert float(value) == pytest.approx(sum(divergence(q, p) for p, q in rows) / 3, rel=1e-5)


@pytest.mark.parametrize("direction", ["teacher-student", "student-teacher"])
def test_equal_texts_do_not_count_and_a_text_without_others_has_no_loss(model, direction):
    numbers = np.array([3, 5, 3, 3])
    students = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = DistillationLoss(model, VECTORS, tau=0.1, direction=direction)
    value = loss.calculate_loss([[students]], torch.tensor(numbers)[:, None])
    expected = reference(students, numbers, 0.1, direction, False)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    value.backward()
    assert students.grad.isfinite().all()
    alone = torch.randn(2, 6, requires_grad=True)
    value = loss.calculate_loss([[alone]], torch.tensor([[1], [1]]))
    value.backward()
    assert value == 0
    assert (alone.grad == 0).all()


def test_with_the_diagonal_at_a_low_temperature_there_is_nothing_left_to_learn(model):
    """Both distributions are nearly one-hot, at the text itself: why `diagonal` is off by default."""
    students = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    teacher = np.random.default_rng(0).normal(size=(12, 64))
    for direction in ("teacher-student", "student-teacher"):
        found = {}
        for diagonal in (False, True):
            loss = DistillationLoss(model, teacher, tau=0.02, direction=direction, diagonal=diagonal)
            found[diagonal] = float(loss.calculate_loss([[students]], torch.arange(12)[:, None]))
        assert found[True] < 0.01 * found[False]


def test_a_student_like_its_teacher_has_no_loss_whatever_its_width(model):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0][:12]
    students = torch.from_numpy((VECTORS @ rotation).astype(np.float32)).requires_grad_()
    value = DistillationLoss(model, VECTORS).calculate_loss([[students]], torch.arange(8)[:, None])
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 0}, "tau is 0; pass a positive number"),
        ({"tau": math.nan}, "tau is nan; pass a positive number"),
        ({"direction": "reverse"}, "direction is 'reverse'; known: teacher-student, student-teacher"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(model, options, said):
    with pytest.raises(Gen2EmbedError, match=said):
        DistillationLoss(model, VECTORS, **options)


def test_labels_that_do_not_fit_the_columns_are_refused(model):
    features = [features_of(model, TEXTS[:2])]
    for labels, said in ((None, "labels are none"), (torch.zeros(2, 2, dtype=torch.int64), r"labels are \(2, 2\)")):
        with pytest.raises(Gen2EmbedError, match=said):
            DistillationLoss(model, VECTORS)(features, labels)
