"""Counts chosen hard negatives that are positives which nobody labelled: `hn`, `hn-beta` and `saha` on MMEB-mini.

python benchmarks/false_negatives.py --output benchmarks/results/false_negatives.json

MMEB-mini stores what every training positive means (its truth): two pairs of equal truth are positives of each other,
whether they are labelled so or not. The three methods run as `gen2embed sample` runs them, with k = 7 and m = 6, and
their files are read back.

- A chosen negative is a pair (anchor a, member n): the positive of row n is pushed away from the query of row a. It is
  false when truth(a) = truth(n). The rate is the share of false ones among all chosen negatives of a subset.
- `saha, all pairs`: training on clusters pushes every positive of a cluster away from every other query of it, so this
  counts all ordered pairs of distinct rows in a cluster, not only those with the anchor first.
- `pool`: the share of false ones in the pool that SaHa chooses from, the m k candidates nearest to the query. A random
  choice from the pool would have this share; the difference from `pool` to `saha` is due to the choice of the least
  similar owners.
- `random`: the same share for a candidate drawn at random from the distinct ones other than the query's own; in-batch
  negatives have this share on average.

The clusters of `saha` are also counted by quarters, in the order in which they were formed. In phase 1 an owner is used
only once: early anchors choose from a whole pool, late ones must take the owners that are left, however similar. Most
of SaHa's false negatives come from this, and not from the choice.

`Digits_i2i` is not part of MMEB-mini. It has scikit-learn's handwritten digits, each paired with another scan of the
same digit. There, one candidate in ten is an unlabelled positive (130 per query), and most of a pool of 42 is such
positives. Therefore SaHa's share is given for larger pools, too. The subset is not counted in the sums.

Subsets whose candidates are labels or answers have no unlabelled positives: equal meaning is equal text there, hence
the same candidate, which no method gives as a negative. Their rates are zero by construction and are shown as a check.

Vectors and files are kept in --work_dir, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.evaluation.tables import as_markdown
from gen2embed_mteb.mini.benchmark import MMEB_MINI, SEED, ensure
from gen2embed_mteb.mini.digits import train_digits
from gen2embed_mteb.mini.places import TRAIN_TABLES
from gen2embed_mteb.mmeb.readers import TrainRow
from gen2embed_mteb.storage.developer_files import write_json
from trainers.data.training_data import TrainingSubset, open_training_data
from trainers.sampling.files import SampledClusters, read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample

DIGIT_PAIRS = "Digits_i2i"
METHODS = {"hn": "hn", "hn-beta": "hn-beta", "pool": "hn", "saha": "saha"}
"""The methods that are run, by the names of their columns."""
MULTIPLIERS = (6, 12, 24, 48, 96)
COLUMNS = ("random", *METHODS, "saha, all pairs")


def main() -> None:
    """Sample with each method, count false negatives, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", default="gen2embed-mini")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("results/false_negatives"))
    parser.add_argument("--data_dir", type=Path, default=None, help="where MMEB-mini is kept (default: user's cache)")
    parser.add_argument("--limit", type=int, default=None, help="rows per subset (default: all)")
    parser.add_argument("--num_hard_negatives", type=int, default=7)
    parser.add_argument("--pool_multiplier", type=int, default=6)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    started = time.monotonic()
    root = ensure("train", arguments.data_dir)
    model = Gen2Embed(arguments.model_name, prompt_mode="hierarchical")
    record = ModelRecord(arguments.model_name, model.revision, model.prompt_mode, fingerprint(model))
    encoder = PrefixEncoder(model)
    counts: dict[str, dict[str, Counter[str]]] = {}
    quarters: dict[str, list[Counter[str]]] = {}
    digits = write_digit_pairs(arguments.work_dir / "digits")
    for source, (column, method) in product((root, digits), METHODS.items()):
        pool = arguments.pool_multiplier if column == "pool" else 1
        output_dir = arguments.work_dir / source.name / column
        config = SampleConfig(
            data_dir=str(source / TRAIN_TABLES),
            output_dir=str(output_dir),
            embedding_dir=str(arguments.work_dir / "embeddings"),
            method=method,
            num_hard_negatives=arguments.num_hard_negatives * pool,
            pool_multiplier=arguments.pool_multiplier,
            limit=arguments.limit,
        )
        data = open_training_data(config, config.images_cache)
        sample(encoder, record, data, config)
        print(f"{source.name}, {column}: {time.monotonic() - started:.0f} s", flush=True)
        for subset in data.subsets:
            truth = json.loads((source / "truth" / f"{subset.name}.json").read_text())
            _, meaning = np.unique(truth, return_inverse=True)
            found = read_sampling(output_dir / f"{subset.name}.parquet").clusters
            columns = counts.setdefault(subset.name, {})
            columns[column] = count_chosen(found, meaning)
            if column == "saha":
                columns["saha, all pairs"] = count_all_pairs(found, meaning)
                columns["random"] = count_random(subset, meaning)
                quarters[subset.name] = [
                    count_chosen(found, meaning, part) for part in np.array_split(np.arange(len(found.anchors)), 4)
                ]
    by_multiplier = digits_by_multiplier(encoder, record, digits, arguments)
    apart = {DIGIT_PAIRS: counts.pop(DIGIT_PAIRS)}
    total = {column: sum((subset[column] for subset in counts.values()), Counter()) for column in COLUMNS}
    concerned = {name: columns for name, columns in counts.items() if columns["random"]["false"]}
    where = {column: sum((subset[column] for subset in concerned.values()), Counter()) for column in COLUMNS}
    rows = [*counts.items(), ("all where there are any", where), ("all", total), *apart.items()]
    table = [["subset", *COLUMNS]]
    table += [[name, *(f"{100 * rate(columns[column]):.2f}" for column in COLUMNS)] for name, columns in rows]
    print(as_markdown(table))
    by_quarter = [sum((quarters[name][part] for name in concerned), Counter()) for part in range(4)]
    print("saha, by quarters of its clusters:", ", ".join(f"{100 * rate(quarter):.2f}" for quarter in by_quarter))
    print(f"{DIGIT_PAIRS}, saha by m:", ", ".join(f"{m}: {100 * share:.2f}" for m, share in by_multiplier.items()))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.output,
        {
            "command": "python benchmarks/false_negatives.py --output benchmarks/results/false_negatives.json",
            "measure": "share of chosen negatives whose truth equals the anchor's",
            "model": vars(record),
            "benchmark": MMEB_MINI.name,
            "seed": SEED,
            "limit": arguments.limit,
            "num_hard_negatives": arguments.num_hard_negatives,
            "pool_multiplier": arguments.pool_multiplier,
            "versions": installed_versions(),
            "seconds": round(time.monotonic() - started, 1),
            "subsets": {name: described(columns) for name, columns in rows},
            "saha_by_quarter": [rate(quarter) for quarter in by_quarter],
            "digits_by_pool_multiplier": by_multiplier,
        },
    )


def digits_by_multiplier(
    encoder: PrefixEncoder, record: ModelRecord, digits: Path, arguments: argparse.Namespace
) -> dict[int, float]:
    """Return SaHa's share of false negatives on the digits, for growing pools."""
    shares = {}
    meaning = np.array(json.loads((digits / "truth" / f"{DIGIT_PAIRS}.json").read_text()))
    for multiplier in MULTIPLIERS:
        config = SampleConfig(
            data_dir=str(digits / TRAIN_TABLES),
            output_dir=str(arguments.work_dir / digits.name / f"saha-{multiplier}"),
            embedding_dir=str(arguments.work_dir / "embeddings"),
            num_hard_negatives=arguments.num_hard_negatives,
            pool_multiplier=multiplier,
            limit=arguments.limit,
        )
        data = open_training_data(config, config.images_cache)
        sample(encoder, record, data, config)
        found = read_sampling(Path(config.output_dir) / f"{DIGIT_PAIRS}.parquet").clusters
        shares[multiplier] = rate(count_chosen(found, meaning))
    return shares


def write_digit_pairs(folder: Path) -> Path:
    """Write the handwritten digits in MMEB-train's form: each scan with the next one of the same digit, in a ring."""
    images, labels = train_digits()
    table, truth = folder / TRAIN_TABLES / DIGIT_PAIRS, folder / "truth" / f"{DIGIT_PAIRS}.json"
    for path in (table, table / "images", truth.parent):
        path.mkdir(parents=True, exist_ok=True)
    following = np.empty(len(labels), np.int64)
    for digit in range(10):
        scans = np.flatnonzero(labels == digit)
        following[scans] = np.roll(scans, -1)
    paths = [f"{DIGIT_PAIRS}/images/{number}.png" for number in range(len(labels))]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels).save(folder / TRAIN_TABLES / path)
    rows = [
        {
            "qry": "<|image_1|>\nFind another picture of the same digit.\n",
            "qry_image_path": path,
            "pos_text": "<|image_1|>\nRepresent the given picture.\n",
            "pos_image_path": paths[following[number]],
        }
        for number, path in enumerate(paths)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table / "original-00000-of-00001.parquet")
    write_json(truth, labels.tolist())
    return folder


def count_chosen(clusters: SampledClusters, meaning: Any, part: Any = slice(None)) -> Counter[str]:
    """Count (anchor, member) pairs, and those of equal meaning, in all clusters or in a part of them."""
    anchors, members = clusters.anchors[part], clusters.members[part]
    real = members >= 0
    equal = (meaning[members] == meaning[anchors][:, None]) & real
    return Counter(false=int(equal.sum()), chosen=int(real.sum()))


def count_all_pairs(clusters: SampledClusters, meaning: Any) -> Counter[str]:
    """Count ordered pairs of distinct rows in a cluster, and those of equal meaning."""
    rows = np.column_stack([clusters.anchors, clusters.members])
    real = rows >= 0
    pairs = real[:, :, None] & real[:, None, :] & ~np.eye(rows.shape[1], dtype=bool)
    means = meaning[rows]
    return Counter(false=int((pairs & (means[:, :, None] == means[:, None, :])).sum()), chosen=int(pairs.sum()))


def count_random(subset: TrainingSubset, meaning: Any) -> Counter[str]:
    """Count (query, distinct candidate other than its own) pairs, and those of equal meaning."""
    rows = [row for row in subset.rows() if isinstance(row, TrainRow)]
    candidates = {row.positive: int(meaning[row.index]) for row in rows}
    with_meaning = Counter(candidates.values())
    false = sum(with_meaning[int(meaning[row.index])] - 1 for row in rows)
    return Counter(false=false, chosen=len(rows) * (len(candidates) - 1))


def rate(count: Counter[str]) -> float:
    """Return the share of false negatives; 0 if none was chosen."""
    return count["false"] / max(1, count["chosen"])


def described(columns: dict[str, Counter[str]]) -> dict[str, dict[str, float]]:
    """Return counts and rates by method, for the JSON."""
    return {
        column: {"false": columns[column]["false"], "chosen": columns[column]["chosen"], "rate": rate(columns[column])}
        for column in COLUMNS
    }


if __name__ == "__main__":
    main()
