"""Encodes both sides of every dataset, keeps the vectors, and scores each row among its own candidates."""

import json
import pickle
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from evaluation.eval_utils import get_pred
from src.arguments import DataArguments, ModelArguments, TrainingArguments
from src.collator import EvalCollator
from src.dataset import EvalDataset
from src.model import MMEBModel
from src.model_utils import get_backbone_name
from src.utils import print_rank
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoProcessor, HfArgumentParser


def to_device(batch, device):
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def encode(dataset, side, model, collator, training_args):
    loader = DataLoader(
        dataset,
        batch_size=training_args.per_device_eval_batch_size,
        collate_fn=collator,
        shuffle=False,
        num_workers=training_args.dataloader_num_workers,
    )
    rows = []
    with torch.no_grad():
        for batch in loader:
            on_device = to_device(batch, training_args.device)
            # Queries alone, on a GPU; on a CPU this is without effect, so bfloat16 is asked of the CPU, too.
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=side == "qry"):
                rows.append(model(**{side: on_device})[f"{side}_reps"].cpu().detach().float().numpy())
    return np.concatenate(rows)


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    output = Path(data_args.encode_output_path)
    output.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(
        model_args.model_name, trust_remote_code=True, num_crops=model_args.num_crops
    )
    model_args.model_backbone = get_backbone_name(
        hf_config=AutoConfig.from_pretrained(model_args.model_name, trust_remote_code=True)
    )
    print_rank(f"backbone {model_args.model_backbone}")
    model = MMEBModel.load(model_args)
    model.eval()
    model = model.to(training_args.device, dtype=torch.bfloat16)
    collator = EvalCollator(data_args=data_args, model_args=model_args, processor=processor)

    for subset in data_args.subset_name:
        paths = {side: output / f"{subset}_{side}" for side in ("qry", "tgt")}
        if all(path.exists() for path in paths.values()):
            print_rank(f"{subset} is there")
            continue
        sides = {
            side: EvalDataset(
                data_args=data_args,
                model_args=model_args,
                subset=subset,
                text_field=f"{side}_text",
                img_path_field=f"{side}_img_path",
            )
            for side in paths
        }
        for side, path in paths.items():
            encoded = encode(sides[side], side, model, collator, training_args)
            with path.open("wb") as file:
                pickle.dump((encoded, sides[side].paired_data), file)

    for subset in data_args.subset_name:
        score(output, subset, data_args, model_args.normalize)


def score(output, subset, data_args, normalize):
    vectors = {}
    for side in ("qry", "tgt"):
        with (output / f"{subset}_{side}").open("rb") as file:
            encoded, pairs = pickle.load(file)
        vectors[side] = {(pair["text"], pair["img_path"]): row for row, pair in zip(encoded, pairs, strict=False)}
    rows = load_dataset(data_args.dataset_name, subset, split=data_args.dataset_split)
    correct, predictions = 0, []
    for row in rows:
        candidates = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
        query = vectors["qry"][row["qry_text"], row["qry_img_path"]]
        _, predicted = get_pred(query, np.stack([vectors["tgt"][item] for item in candidates]), normalize)
        correct += int(predicted == 0)
        predictions.append(candidates[predicted])
    (output / f"{subset}_pred.txt").write_text("".join(f"{item}\n" for item in predictions))
    found = {"acc": correct / len(rows), "num_correct": correct, "num_pred": len(rows)}
    (output / f"{subset}_score.json").write_text(json.dumps(found, indent=4))
    print_rank(f"{subset} accuracy {found['acc']}")


if __name__ == "__main__":
    main()
