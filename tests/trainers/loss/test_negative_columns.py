"""Columns anchor, positive, negative_1, … in sentence-transformers' own trainer, and in ours where rows have fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from gradients import assert_same, gradients
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn.functional import normalize

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import SahaLoss, SahaTrainer

TAU = 0.02
COLUMNS: dict[str, list[str | None]] = {
    "anchor": ["first query", "second query", "third query", "fourth"],
    "positive": ["a dog", "a cat on a mat", "a cow", "a dog"],
    "negative_1": ["an owl", "a bee", "a wolf, and others", "a fox"],
    "negative_2": ["a hen", "an elk", "a cat on a mat", "an ant"],
}
RAGGED = {**COLUMNS, "negative_1": ["an owl", None, "a bee", "a fox"], "negative_2": [None, None, "an ant", None]}


def reference(model: Gen2Embed, columns: dict[str, list[Any]]) -> torch.Tensor:
    """Every query against all candidates that are there, without copies of its positive; one uncached pass each."""
    queries, *others = columns.values()
    q = normalize(model(model.preprocess(queries, task="query"))["sentence_embedding"])
    words = [word for column in others for word in column if word is not None]
    distinct = list(dict.fromkeys(words))
    c = normalize(model(model.preprocess(distinct, task="document"))["sentence_embedding"])
    total = torch.zeros(())
    for row, positive in enumerate(columns["positive"]):
        kept = [distinct.index(word) for word in words if word != positive]
        scores = (q[row] @ c[[distinct.index(positive), *kept]].T) / TAU
        total = total - torch.log_softmax(scores, dim=0)[0]
    return total / len(queries)


def arguments(folder: Path) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        router_mapping={name: "document" if number else "query" for number, name in enumerate(COLUMNS)},
    )


@pytest.mark.parametrize("kind", ["stock", "ours", "ours, ragged"])
def test_a_batch_of_the_trainer_against_a_plain_reference(tiny_dir: Any, tmp_path: Path, kind: str) -> None:
    columns = RAGGED if kind == "ours, ragged" else COLUMNS
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    made = SentenceTransformerTrainer if kind == "stock" else SahaTrainer
    trainer = made(model, arguments(tmp_path), Dataset.from_dict(columns), loss=SahaLoss(model, mini_batch_size=3))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    found = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    expected = reference(model, columns)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, found), gradients(model, expected))


def test_a_loss_that_cannot_leave_negatives_out_gets_no_row_without_them(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    loss = MultipleNegativesRankingLoss(model)
    trainer = SahaTrainer(model, arguments(tmp_path), Dataset.from_dict(RAGGED), loss=loss)
    with pytest.raises(Gen2EmbedError, match="nothing to encode"):
        trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
