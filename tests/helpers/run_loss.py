"""Runs the loss on a share of a fixed batch, in a process of its own: MODEL OUTPUT.

The variables of torchrun say which share. Each process writes the gradients it ends with to OUTPUT/<rank>.pt.
"""

import os
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


def main(model_dir: str, output: Path) -> None:
    """Wraps the model in DDP, as a trainer does, and propagates gradients of the loss of this rank's pairs."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from gen2embed_mteb import Gen2Embed
    from trainers import SahaLoss

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    model = Gen2Embed(model_dir, device="cpu")
    loss = SahaLoss(model, mini_batch_size=2)
    loss.model = DistributedDataParallel(model, find_unused_parameters=True)
    share = slice(rank * 8 // size, (rank + 1) * 8 // size)
    queries, positives = (side[share] for side in fixed_pairs())
    features = [model.preprocess(queries, task="query"), model.preprocess(positives, task="document")]
    value = loss(features)
    value.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.save({"loss": value.detach(), "gradients": gradients}, output / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
