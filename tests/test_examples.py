"""The example scripts, run as they stand, on a few rows of MMEB-mini."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from gen2embed_mteb import cli
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.tasks import tasks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A sampling file of 24 scenes and their captions, k = 3, written by `gen2embed sample`."""
    home = tmp_path_factory.mktemp("cache")
    few = [replace(task, num_train=24) for task in tasks(benchmark.train_digits) if task.info.name == "Scenes_t2i"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "tasks", lambda _: few)
        root = benchmark.ensure("train", home / "mmeb-mini")
    words = ["sample", "--model_name", "gen2embed-mini", "--data_dir", str(root / "MMEB-train"), "--subsets"]
    words += ["Scenes_t2i", "--output_dir", str(home / "saha"), "--num_hard_negatives", "3", "--pool_multiplier", "2"]
    assert cli.main(words) == 0
    return home / "saha" / "Scenes_t2i.parquet"


def test_the_stock_trainer_trains_with_saha_batches(sampled, tmp_path):
    example = runpy.run_path(str(EXAMPLES / "train_with_saha_batches.py"))
    few = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True}
    trainer = example["main"](str(sampled), str(tmp_path), **few, save_strategy="no", logging_steps=1, report_to="none")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)

    sampler = trainer.get_train_dataloader().batch_sampler
    assert {len(batch) for batch in sampler} == {8}
    # Queries were read as queries: the trainer's own batches end in the representation prompt.
    batch = trainer.data_collator([trainer.train_dataset[row] for row in next(iter(sampler))])
    ends = [trainer.model.tokenizer.decode(ids)[-90:] for ids in batch["query_input_ids"]]
    assert all("in one word." in end for end in ends)
    assert "positive_pixel_values" in batch and "query_pixel_values" not in batch

    saved, before = SentenceTransformer(str(tmp_path / "model"), device="cpu"), SentenceTransformer("gen2embed-mini")
    pairs = zip(saved.parameters(), before.cpu().parameters(), strict=True)
    assert any(not torch.equal(now, then) for now, then in pairs)
    assert "SahaLoss" in (tmp_path / "model" / "README.md").read_text()
