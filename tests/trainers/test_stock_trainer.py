"""A `Gen2Embed` with `add_adapter` in sentence-transformers' own trainer: checkpoints hold the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from gen2embed_mteb import Gen2Embed

pytestmark = pytest.mark.slow

PAIRS = Dataset.from_dict(
    {
        "anchor": [f"which shape is number {number}?" for number in range(16)],
        "positive": [f"it is shape number {number}" for number in range(16)],
    }
)


class FirstIsBest(BaseEvaluator):
    """Says 3, 2, 1: the first checkpoint is the best."""

    def __init__(self) -> None:
        super().__init__()
        self.primary_metric = "score"
        self.calls = 0

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.calls += 1
        return {"score": 4.0 - self.calls}


def adapted(directory: Path, **options: Any) -> Gen2Embed:
    torch.manual_seed(3)
    model = Gen2Embed(directory, device="cpu", **options)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True, "init_lora_weights": "gaussian"}
    model.add_adapter(LoraConfig(**settings))
    return model


def trainer(model: Gen2Embed, output_dir: Path, **options: Any) -> SentenceTransformerTrainer:
    evaluator = options.pop("evaluator", None)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output_dir),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        eval_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=5,
        **options,
    )
    loss = MultipleNegativesRankingLoss(model)
    return SentenceTransformerTrainer(model, arguments, PAIRS, loss=loss, evaluator=evaluator)


def weights(model: Gen2Embed) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("layout", ["native", "official"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_dir: Any, tmp_path: Path, layout: str) -> None:
    whole = adapted(tiny_dir("qwen2_vl"), layout=layout)
    trainer(whole, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_dir("qwen2_vl"))
    assert not (checkpoint / "model.safetensors").exists()
    resumed = adapted(tiny_dir("qwen2_vl"), layout=layout)
    trainer(resumed, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert weights(resumed).keys() == weights(whole).keys()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_the_best_checkpoint_is_the_model_in_the_end(tiny_dir: Any, tmp_path: Path) -> None:
    model = adapted(tiny_dir("qwen2_vl"))
    running = trainer(
        model,
        tmp_path / "run",
        evaluator=FirstIsBest(),
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
        greater_is_better=True,
    )
    running.train()
    assert running.state.best_model_checkpoint.endswith("checkpoint-2")
    first = Gen2Embed(tmp_path / "run" / "checkpoint-2", device="cpu")
    last = Gen2Embed(tmp_path / "run" / "checkpoint-6", device="cpu")
    text = "which shape is it?"
    assert np.abs(model.encode_query(text) - first.encode_query(text)).max() < 1e-6
    assert np.abs(model.encode_query(text) - last.encode_query(text)).max() > 1e-4
    # The final model is one whole, as often as it is saved.
    for _ in range(2):
        running.save_model(str(tmp_path / "run" / "final"))
        running.save_model()
    for folder in (tmp_path / "run" / "final", tmp_path / "run"):
        assert np.abs(SentenceTransformer(str(folder)).encode_query([text]) - model.encode_query([text])).max() < 1e-5
        assert not (folder / "adapter_config.json").exists()


def test_checkpoints_of_a_half_precision_model_keep_every_bit(tiny_dir: Any, tmp_path: Path) -> None:
    model = adapted(tiny_dir("qwen2_vl"), model_kwargs={"dtype": torch.bfloat16})
    running = trainer(model, tmp_path / "run")
    running.train()
    last = weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    running._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-6"))
    for name, value in weights(model).items():
        assert torch.equal(value, last[name]), name


def test_a_checkpoint_of_two_adapters_is_refused(tiny_dir: Any, tmp_path: Path) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "mine")
    with pytest.raises(ValueError, match="one adapter, called 'default', and the model has 'mine'"):
        model.save_pretrained(str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-2").exists()
