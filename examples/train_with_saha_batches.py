"""Trains on SaHa batches with sentence-transformers' own trainer.

gen2embed sample --model_name gen2embed-mini --data_dir mmeb-mini --subsets ColorShape --output_dir saha
python examples/train_with_saha_batches.py saha/ColorShape.parquet fine-tuned
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments

from trainers import OpenInputs, SahaBatchSampler, SahaLoss, training_dataset
from trainers.data.config import DataConfig
from trainers.data.training_data import open_training_data
from trainers.sampling.files import read_sampling


def main(sampling_file: str, output_dir: str, **options: Any) -> SentenceTransformerTrainer:
    """Train on one subset; `options` are training arguments."""
    sampling = read_sampling(sampling_file)
    source = DataConfig(data_dir=sampling.record["data"]["data_dir"], subsets=(sampling.record["subset"],))
    data = open_training_data(source, cache=Path(output_dir, "images"))
    train = training_dataset(data, sampling)
    model = SentenceTransformer("gen2embed-mini")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=output_dir,
        batch_sampler=partial(SahaBatchSampler, sampling=train.clusters),
        router_mapping=train.roles,  # queries carry the representation prompt
        **{"per_device_train_batch_size": 64, "learning_rate": 1e-3, "num_train_epochs": 1, **options},
    )
    trainer = SentenceTransformerTrainer(
        model, arguments, train.dataset.with_transform(OpenInputs(data.images)), loss=SahaLoss(model)
    )
    trainer.train()
    model.save_pretrained(str(Path(output_dir, "model")))
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:3])
