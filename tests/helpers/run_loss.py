"""Runs the losses on a share of a fixed batch, in a process of its own: MODEL OUTPUT.

The variables of torchrun say which share. Each process writes the gradients it ends with to OUTPUT/<rank>.pt, by loss.
"""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def fixed_pairs() -> tuple[list[Any], list[Any]]:
    """Eight queries and their positives, of which 0 and 5 are one text, 3 and 4 another, 2 and 6 one image."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)) for _ in range(4)]
    queries: list[Any] = [{"text": f"query number {number}"} for number in range(8)]
    queries[1] = {"image": images[0], "text": "what is it"}
    queries[6] = {"image": images[1]}
    positives: list[Any] = [{"text": word} for word in ("dog", "a longer text", "", "cat", "cat", "dog", "", "cow")]
    positives[2] = {"image": images[2], "text": "a photo"}
    positives[6] = {"image": images[2].copy(), "text": "a photo"}
    positives[7] = {"image": images[3], "text": "a photo"}
    return queries, positives


def run_two_processes(model_dir: Path, output: Path, preloaded: Any) -> list[dict[str, Any]]:
    """What two processes under DDP, over gloo, end with: each one's loss and gradients, by loss."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [__file__, str(model_dir), str(output)]
    for process in [preloaded.start(command, **environment, RANK=rank) for rank in ("0", "1")]:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    return [torch.load(output / f"{rank}.pt") for rank in (0, 1)]


LABELS = np.array([[0, 8], [1, 9], [2, 10], [3, 11], [4, 11], [5, 8], [6, 10], [7, 12]])
"""For distillation, the row of the teacher's vectors for each query and positive of `fixed_pairs`."""


def loss_of(name: str, model: Any, **options: Any) -> Any:
    """A loss by name, with mini-batches of 2."""
    import trainers
    from trainers.distillation.loss import DistillationLoss
    from trainers.loss.matryoshka import at_widths

    if name == "DistillationLoss":
        teacher = np.random.default_rng(0).normal(size=(13, 12))
        return DistillationLoss(model, teacher, tau=0.2, mini_batch_size=2, **options)
    kind = name.removeprefix("Matryoshka").removeprefix("Stated")
    loss = getattr(trainers, kind)(model, mini_batch_size=2, **OPTIONS[name], **options)
    return loss if kind == name else at_widths(model, loss, WIDTHS, WEIGHTS)


def state_facts(features: list[dict[str, Any]], share: slice) -> None:
    """State what a data set may: candidate 7 is a further positive of queries 0 and 6."""
    import torch

    known = torch.full((8, 2), -2)
    known[:, 0] = torch.arange(8)
    known[[0, 6], 1] = 7
    features[0]["known_positives"] = known[share]
    features[1]["candidate_number"] = torch.arange(8)[share]


WIDTHS, WEIGHTS = (32, 16, 5), (1.0, 0.5, 0.25)
OPTIONS: dict[str, dict[str, Any]] = {
    "SahaLoss": {},
    "UnimeLoss": {"beta": 0.15, "num_hard_negatives": 5},
    "MatryoshkaSahaLoss": {},
    "StatedSahaLoss": {"mask_equal_positives": False},
    "MatryoshkaUnimeLoss": {"beta": 0.15, "num_hard_negatives": 5},
}
"""The options of contrastive losses; with UniME's, some rows have fewer than five candidates left, and one none."""


def main(model_dir: str, output: Path) -> None:
    """Wraps the model in DDP, as a trainer does, and propagates gradients of the loss of this rank's pairs."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from gen2embed_mteb import Gen2Embed

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    model = Gen2Embed(model_dir, device="cpu")
    share = slice(rank * 8 // size, (rank + 1) * 8 // size)
    queries, positives = (side[share] for side in fixed_pairs())
    found = {}
    for name in (*OPTIONS, "DistillationLoss"):
        loss = loss_of(name, model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        wrapped.get_embedding_dimension = model.get_embedding_dimension  # as sentence-transformers' trainer does
        for part in (loss, getattr(loss, "loss", None)):
            if hasattr(part, "model"):
                part.model = wrapped
        features = [model.preprocess(queries, task="query"), model.preprocess(positives, task="document")]
        if name.startswith("Stated"):
            state_facts(features, share)
        value = loss(features, torch.from_numpy(LABELS[share]))
        value.backward()
        gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        found[name] = {"loss": value.detach(), "gradients": gradients}
        model.zero_grad()
    torch.save(found, output / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
