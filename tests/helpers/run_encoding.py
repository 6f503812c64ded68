"""Encodes a fixed list in a process of its own, as the environment's share: FOLDER [SECONDS_PER_BATCH]."""

import sys
from pathlib import Path


def main(folder: Path, delay: float) -> None:
    """Vectors go to FOLDER/<rank>.npy, the number of inputs encoded here to FOLDER/<rank>.txt."""
    import numpy as np
    from plain_encoder import PlainEncoder

    from gen2embed_mteb.bulk.encoder import BATCHES_PER_SHARD, BulkEncoder
    from gen2embed_mteb.bulk.processes import Share
    from gen2embed_mteb.bulk.store import EmbeddingStore
    from gen2embed_mteb.bulk.types import Item
    from gen2embed_mteb.images.source import ImageSource

    items = [Item(f"text {number:03}") for number in range(8 * BATCHES_PER_SHARD)]
    share = Share.from_environment()
    store = EmbeddingStore(folder / "e", {"f": "1"})
    bulk = BulkEncoder(PlainEncoder(delay), store, ImageSource(folder), batch_size=1, share=share)
    bulk.add("query", items)
    np.save(folder / f"{share.rank}.npy", bulk.vectors("query", items))
    (folder / f"{share.rank}.txt").write_text(str(bulk.num_encoded))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
