"""Health figures, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gen2embed_mteb.embedder.reranking.health import ENOUGH, Answers, Health, option_probabilities


def test_mass_and_share_of_logits_made_by_hand():
    answers = Answers(("A", "B"))
    # Probabilities 0.1, 0.3, 0.6; then 0.5, 0.25, 0.25. The first option is token 2, the second token 0.
    answers.add(option_probabilities(torch.tensor([[0.1, 0.3, 0.6], [0.5, 0.25, 0.25]]).log() + 7.0, (2, 0)))
    answers.add(option_probabilities(torch.tensor([[0.2, 0.7, 0.1]]).log(), (2, 0)))
    found = answers.health
    assert found.answers == 3
    assert math.isclose(found.mass, (0.7 + 0.75 + 0.3) / 3, abs_tol=1e-6)
    assert found.share == 1 / 3
    assert found.options == ("A", "B")


def test_no_answer_has_no_health():
    assert Answers(("A", "B")).health is None


@pytest.mark.parametrize(
    ("answers", "mass", "share", "warned"),
    [
        (100, 0.9, 0.3, ""),
        (100, 0.5, 0.3, ""),
        (1, 0.499, 0.3, "does not answer"),
        (ENOUGH, 0.9, 0.96, "does not decide"),
        (ENOUGH, 0.9, 0.04, "does not decide"),
        (ENOUGH, 0.9, 0.95, ""),
        (ENOUGH, 0.9, 0.05, ""),
        (ENOUGH - 1, 0.9, 1.0, ""),
    ],
)
def test_the_warning_says_what_is_wrong(answers, mass, share, warned):
    warning = Health(answers, mass, share, ("A", "B")).warning
    assert (warned in warning) if warned else warning == ""
