"""Encodes the pictures of a folder in workers, in a program without a `__main__` guard: FOLDER WORKERS [SECONDS]."""

import sys
from pathlib import Path

import numpy as np
from split_encoder import SplitPlainEncoder

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import run_command
from gen2embed_mteb.images.source import ImageSource

folder, workers = Path(sys.argv[1]), int(sys.argv[2])
seconds_per_batch = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0


def encode() -> None:
    store, images = EmbeddingStore(folder / "e", {}), ImageSource(folder)
    bulk = BulkEncoder(SplitPlainEncoder(seconds_per_batch), store, images, num_workers=workers, batch_size=1)
    items = [Item("", (path.name,)) for path in sorted(folder.glob("*.png"))]
    bulk.add("query", items)
    np.save(folder / "vectors.npy", bulk.vectors("query", items))
    sys.stdout.write("done\n")


sys.exit(run_command("encode", encode))
