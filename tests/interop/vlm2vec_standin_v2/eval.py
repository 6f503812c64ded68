"""Encodes the rows of every dataset, each process its part, gathers the vectors, and scores candidates by name."""

import datetime
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from datasets import concatenate_datasets
from datasets.distributed import split_dataset_by_node
from src.arguments import DataArguments, ModelArguments, TrainingArguments
from src.data.collator.eval_collator import MultimodalEvalDataCollator
from src.data.eval_dataset.base_eval_dataset import AutoEvalPairDataset, generate_cand_dataset
from src.model.model import MMEBModel
from src.model.processor import get_backbone_name, load_processor
from src.utils.basic_utils import batch_to_device, print_master
from src.utils.eval_utils.metrics import RankingMetrics
from torch.utils.data import DataLoader
from transformers import AutoConfig, HfArgumentParser


def own_part(dataset, rank, world_size):
    """This process's contiguous part, the whole filled up from its start so that all parts are equal."""
    lacking = -len(dataset) % world_size
    if lacking:
        dataset = concatenate_datasets([dataset, dataset.select(range(lacking))])
    return split_dataset_by_node(dataset, rank=rank, world_size=world_size)


def encode(model, dataset, side, collator, training_args):
    loader = DataLoader(
        dataset,
        batch_size=training_args.per_device_eval_batch_size,
        collate_fn=collator,
        num_workers=training_args.dataloader_num_workers,
    )
    vectors, infos = [], []
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        for inputs, batch_infos in loader:
            on_device = batch_to_device(inputs, training_args.device)
            with torch.autocast(kind, dtype=torch.bfloat16):
                output = model(qry=on_device) if side == "qry" else model(tgt=on_device)
            vectors.append(output["qry_reps" if side == "qry" else "tgt_reps"].detach())
            infos.extend(batch_infos if side == "qry" else [info["cand_name"] for info in batch_infos])
    found = torch.cat(vectors).contiguous().to(training_args.device)
    if dist.is_initialized():
        parts = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, found)
        gathered = [None] * len(parts)
        dist.all_gather_object(gathered, infos)
        found, infos = torch.cat(parts), [info for part in gathered for info in part]
    return found.cpu().float().numpy(), infos


def main():
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(backend="nccl", timeout=datetime.timedelta(minutes=5))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    output = Path(data_args.encode_output_path)
    output.mkdir(parents=True, exist_ok=True)
    hf_config = AutoConfig.from_pretrained(model_args.model_name, trust_remote_code=True)
    if not model_args.model_backbone:
        model_args.model_backbone = get_backbone_name(hf_config=hf_config, model_type=model_args.model_type)
    print_master(f"backbone {model_args.model_backbone}")
    processor = load_processor(model_args, data_args)
    model = MMEBModel.load(model_args, is_trainable=False, processor=processor)
    model.eval()
    model = model.to(training_args.device, dtype=torch.bfloat16)

    configuration = yaml.safe_load(Path(data_args.dataset_config).read_text())
    for name, task in configuration.items():
        if dist.is_initialized():
            dist.barrier()
        paths = {side: output / f"{name}_{side}" for side in ("qry", "tgt")}
        needed = {"qry": [paths["qry"], output / f"{name}_info.jsonl"], "tgt": [paths["tgt"]]}
        missing = [side for side, files in needed.items() if not all(path.exists() for path in files)]
        if missing:
            task["image_root"] = str(Path(data_args.data_basedir or "") / task["image_root"])
            queries, corpus = AutoEvalPairDataset.instantiate(model_args=model_args, data_args=data_args, **task)
            sides = {"qry": queries, "tgt": generate_cand_dataset(queries, corpus)}
        if dist.is_initialized():
            dist.barrier()
        for side in missing:
            part = own_part(sides[side], rank, world_size)
            collator = MultimodalEvalDataCollator(processor, model_args, data_args, "qry" if side == "qry" else "cand")
            vectors, infos = encode(model, part, side, collator, training_args)
            vectors, infos = vectors[: len(sides[side])], infos[: len(sides[side])]
            if rank == 0:
                keep = vectors if side == "qry" else dict(zip(infos, vectors, strict=True))
                with paths[side].open("wb") as file:
                    pickle.dump(keep, file)
                if side == "qry":
                    (output / f"{name}_info.jsonl").write_text("".join(json.dumps(info) + "\n" for info in infos))
        if rank == 0:
            score(output, name)


def score(output, name):
    if (output / f"{name}_score.json").exists():
        return
    with (output / f"{name}_qry").open("rb") as queries_file, (output / f"{name}_tgt").open("rb") as candidates_file:
        queries, candidates = pickle.load(queries_file), pickle.load(candidates_file)
    predictions = []
    for query, line in zip(queries, (output / f"{name}_info.jsonl").read_text().splitlines(), strict=True):
        info = json.loads(line)
        names = info["cand_names"]
        ranked = np.argsort(-np.dot(query, np.stack([candidates[key] for key in names]).T))
        predictions.append({"prediction": [names[place] for place in ranked], "label": info["label_name"]})
    found = RankingMetrics(["hit", "mrr"]).evaluate(predictions)
    found |= {"num_pred": len(predictions), "num_data": len(queries)}
    (output / f"{name}_score.json").write_text(json.dumps(found, indent=4))
    (output / f"{name}_pred.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    print_master(f"{name} hit@1 {found['hit@1']}")


if __name__ == "__main__":
    main()
