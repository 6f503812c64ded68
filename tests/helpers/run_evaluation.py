"""Runs one evaluation in a process of its own, so that a test can kill it: DATA_DIR OUTPUT_DIR SECONDS_PER_BATCH."""

import sys
from pathlib import Path


def main(data_dir: str, output_dir: str, delay: str) -> int:
    """The run; its exit status is the command line's: non-zero past the error rate."""
    from plain_encoder import PlainEncoder

    from gen2embed_mteb.config import EvaluationConfig
    from gen2embed_mteb.mmeb import MMEB
    from gen2embed_mteb.mmeb.evaluate import evaluate

    config = EvaluationConfig(
        data_dir=data_dir,
        output_dir=output_dir,
        fingerprint="plain",
        batch_size=1,
        subsets=("VOC2007", "MSCOCO_t2i", "RefCOCO-Matching"),
    )
    return int(evaluate(PlainEncoder(delay=float(delay)), MMEB, config).too_many_errors)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    sys.exit(main(*sys.argv[1:]))
