"""The second half of the demo: a short SaHa fine-tuning of `gen2embed-mini`, as `sample` and `train` do it.

Three things differ from the recipe, which is for a model a thousand times larger and a run a hundred times longer: a
higher learning rate with a shorter warm-up, batches of 64 pairs, and no dropout. Only some training pairs are used.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from gen2embed_mteb.demo.run import LOG, WRITER, FineTuned
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini import benchmark
from gen2embed_mteb.mini.places import TRAIN_TABLES
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.config import TrainConfig
from trainers.data.training_data import open_training_data
from trainers.fine_tuning import train
from trainers.output.figures import TIMING_FILE
from trainers.recipe import SahaTrainingArguments
from trainers.sampling.sample import ModelRecord, SampleConfig, sample
from trainers.sampling.viewer import inspect

MODEL = "gen2embed-mini"
PROMPT_MODE = "hierarchical"
NUM_HARD_NEGATIVES, POOL_MULTIPLIER = 7, 6
ROWS = 600
"""Training pairs per subset: more than the demo's steps use, and few enough to be encoded within a minute."""
FEWEST_ROWS = 16
"""With fewer training pairs, the subsets would not have enough clusters for a batch."""
BATCH_SIZE, LEARNING_RATE, WARMUP_SHARE = 64, 1e-3, 6
SHOWN = "Scenes_t2i"
"""The subset whose clusters are shown on a page."""
CLUSTERS_SHOWN = 6


def fine_tune(
    output_dir: Path, data_dir: Path | None, limit: int | None, max_steps: int
) -> Generator[str, None, FineTuned]:
    """Sample clusters and train on them, and yield lines that say what is done; may be repeated in the same folder.

    Args:
        output_dir: Receives the model in `gen2embed-mini-saha`, the clusters in `saha-ROWS`, and what the trainer
            prints in `training.log`.
        data_dir: The folder of MMEB-mini; None: the user's cache folder.
        limit: Training pairs per subset, kept between `FEWEST_ROWS` and `ROWS`; None: `ROWS`.
        max_steps: Optimizer steps of 64 pairs.

    Returns:
        The places of the model and of the page of clusters.

    Raises:
        ValueError: `max_steps` is below 1.
    """
    if max_steps < 1:
        raise Gen2EmbedError(f"max_steps is {max_steps}; pass 1 or more")
    rows = ROWS if limit is None else min(ROWS, max(limit, FEWEST_ROWS))
    # The name has the number of rows, so that a demo with another number does not replace these clusters.
    sampled_dir = output_dir / f"saha-{rows}"
    yield "Drawing MMEB-mini's training pairs, unless they are there already …"
    root = benchmark.ensure("train", data_dir)
    yield f"SaHa: encoding {rows:,} pairs per subset, choosing {NUM_HARD_NEGATIVES} hard negatives each …"
    config = SampleConfig(
        data_dir=str(root / TRAIN_TABLES),
        output_dir=str(sampled_dir),
        num_hard_negatives=NUM_HARD_NEGATIVES,
        pool_multiplier=POOL_MULTIPLIER,
        limit=rows,
        overwrite=True,
    )
    model = Gen2Embed(MODEL, prompt_mode=PROMPT_MODE, device="cpu")
    record = ModelRecord(MODEL, model.revision, model.prompt_mode, fingerprint(model))
    data = open_training_data(config, config.images_cache)
    sampled = sample(PrefixEncoder(model), record, data, config)
    num_clusters = sum(found["counts"]["clusters"] for found in sampled.records)
    clusters = inspect(sampled_dir / f"{SHOWN}.parquet", num_clusters=CLUSTERS_SHOWN)
    yield (
        f"Fine-tuning on {num_clusters:,} clusters of {NUM_HARD_NEGATIVES + 1} pairs: {max_steps} steps of "
        f"{BATCH_SIZE} pairs …"
    )
    folder = output_dir / f"{MODEL}-saha"
    with _quiet(OwnedFolder(output_dir, WRITER)):
        trained = train(
            TrainConfig(
                model_name=MODEL,
                processed_data_path=str(sampled_dir),
                prompt_mode=PROMPT_MODE,
                lora_dropout=0.0,
                resize="processor",
            ),
            SahaTrainingArguments(
                output_dir=str(folder),
                max_steps=max_steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                warmup_steps=max_steps // WARMUP_SHARE,
                logging_steps=1,
                save_strategy="no",  # a run of a minute needs no checkpoints, and the next run would have to resume one
                report_to="none",
                disable_tqdm=not sys.stderr.isatty(),
                use_cpu=True,
                bf16=False,
            ),
        )
    loss = trained["metrics"]["train_loss"]
    seconds = json.loads((folder / TIMING_FILE).read_bytes())["train_runtime"]
    yield f"Fine-tuned in {seconds:.0f} s, mean loss {loss:.2f}; the model is in {folder}"
    return FineTuned(folder, clusters)


@contextlib.contextmanager
def _quiet(folder: OwnedFolder) -> Iterator[None]:
    """Write what the trainer prints to a file; between the demo's own lines, a terminal shows only a progress bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        folder.write(LOG, log.getvalue().encode("utf-8", "backslashreplace"))
