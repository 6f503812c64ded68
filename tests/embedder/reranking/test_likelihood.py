"""Answers behind conversations, and their log-probabilities, by hand."""

from __future__ import annotations

import math

import torch

from gen2embed_mteb.embedder.reranking.likelihood import log_probabilities, with_answers


def test_answers_stand_at_the_right_and_padding_at_the_left():
    features = {
        "input_ids": torch.tensor([[0, 0, 5], [6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1], [1, 0, 0]]),
        "pixel_values": torch.ones(4, 2),
        "modality": "message",
    }
    found = with_answers(features, [[1, 2, 3], [4]], pad=9)
    assert found["input_ids"].tolist() == [[5, 1, 2, 3], [6, 7, 8, 4]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert found["mm_token_type_ids"].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert found["pixel_values"] is features["pixel_values"]
    assert found["logits_to_keep"] == 4
    found = with_answers(features, [[1], [4]], pad=9)
    assert found["input_ids"].tolist() == [[9, 9, 5, 1], [6, 7, 8, 4]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_log_probabilities_are_sums_over_the_tokens_of_an_answer():
    rows = torch.tensor(
        [
            [[0.1, 0.9], [0.2, 0.8], [0.5, 0.5]],  # the last position stands behind the answer
            [[0.4, 0.6], [0.3, 0.7], [0.5, 0.5]],
        ]
    )
    found = log_probabilities(rows.log() + 3.0, [[0, 1], [1]])
    assert torch.allclose(found, torch.tensor([math.log(0.1) + math.log(0.8), math.log(0.7)]))
