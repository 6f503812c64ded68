"""The files that `gen2embed sample` writes for each subset, and that training reads.

`<subset>.parquet` has one row per cluster, in the order in which the clusters were formed:

| column         | type          | meaning                                                                           |
|----------------|---------------|-----------------------------------------------------------------------------------|
| `anchor`       | int64         | the anchor's row id                                                               |
| `members`      | list<int64>   | row ids, in the order of the method; a short cluster has a shorter list           |
| `phase`        | int8          | 1 or 2 (Algorithm 1); 1 for the other methods                                     |
| `similarities` | list<float32> | one per member: between the anchor's query and what `MEANING` names               |

Where queries have several positives, files of `hn` and `hn-beta` also have `places`, list<int64>: which of a member's
positives is meant, counted from 0.

A row id is the number of a row in the split of the training data, from 0. The files hold no texts or images; training
reads the rows from the training data itself.

`<subset>.json`, the record, names the data (with a digest of its rows), the model (with its fingerprint), every
setting, the counts and the Parquet file's checksum. It is written last: a subset is finished when its record is there.

`<subset>_hard_negatives.json` is the official code's form, for programs that read it: a list of training rows, each
with its members' rows under `neg_samples`, or, for plain hard negatives, with lists as `neg_text` and `neg_image_path`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.sampling.cluster_table import SampledClusters, as_parquet, check, from_parquet
from trainers.sampling.records import (
    AGAIN,
    ANEW,
    FORMAT,
    MAX_HARD_NEGATIVES,
    METHODS,
    OFFICIAL_SUFFIX,
    SamplingError,
    read_record,
    require_record,
)

__all__ = [
    "MEANING",
    "METHODS",
    "OFFICIAL_SUFFIX",
    "WRITER",
    "RowsDigest",
    "SampledClusters",
    "Sampling",
    "SamplingError",
    "read_official",
    "read_record",
    "read_sampling",
    "subset_files",
    "write_official",
    "write_sampling",
]

WRITER = "sample"
"""The writer that owns the files of a sampling folder; see `gen2embed_mteb.storage.owned_folder`."""
_ONLY_POSITIVE = (
    "of a member only its positive is meant, a hard negative of the anchor; similarity of query and negative"
)
MEANING = {
    "saha": "members are whole pairs: every query of a cluster meets every positive of it; similarity of the queries",
    "hn": _ONLY_POSITIVE,
    "hn-beta": _ONLY_POSITIVE,
    "in-batch": "every row is alone; its negatives are what else is in the batch",
}


@dataclass(frozen=True)
class Sampling:
    """A subset's clusters, and the record of how they were made.

    Attributes:
        path: The path of the record.
        record: The content of the record.
        clusters: The clusters.
    """

    path: Path
    record: dict[str, Any]
    clusters: SampledClusters

    def require_data(self, digest: str) -> None:
        """Check that the row ids refer to the data that was opened.

        Args:
            digest: The `RowsDigest` of the data's rows.

        Raises:
            SamplingError: The clusters were made with other rows.
        """
        if self.record["data"]["digest"] != digest:
            data = self.record["data"]
            raise SamplingError(
                f"{self.path}: made with other rows than these; it used {data['source']}, split {data['split']!r}, "
                f"limit {data['limit']}. Pass that data, or {AGAIN} on this"
            )


class RowsDigest:
    """Makes a digest of training rows in order: of row numbers, texts and image paths."""

    def __init__(self) -> None:
        """Begin with no rows."""
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, row: TrainRow | BadRow) -> None:
        """Add the next row."""
        content: list[Any] = [row.index]
        if isinstance(row, TrainRow):
            content += [row.query, row.positive]
            content += [row.more_positives, row.negatives] if row.more_positives or row.negatives else []
        self._digest.update(json.dumps(content).encode() + b"\n")

    def hexdigest(self) -> str:
        """Return the digest, 32 hexadecimal digits."""
        return self._digest.hexdigest()


def subset_files(subset: str) -> tuple[str, str, str]:
    """Return the names of a subset's files: its clusters, its record, and the official form.

    Args:
        subset: The subset's name.
    """
    return f"{subset}.parquet", f"{subset}.json", subset + OFFICIAL_SUFFIX


def write_sampling(directory: Path, record: Mapping[str, Any], clusters: SampledClusters) -> None:
    """Write a subset's Parquet file, then its record; equal clusters are equal bytes.

    Args:
        directory: The folder; it is made if it is missing.
        record: The record's content, with every field of `records.REQUIRED` but `file` and `sha256`.
        clusters: The clusters.

    Raises:
        ForeignFileError: A file of one of these names is there that `gen2embed sample` did not write, or that was
            changed since; nothing was written then.
        ValueError: A field of the record is missing or out of its range.
    """
    data = as_parquet(clusters)
    clusters_file, record_file, official_file = subset_files(record["subset"])
    head = {"format": FORMAT, "subset": record["subset"], "method": record["method"]}
    head |= {"meaning": MEANING[record["method"]], "file": clusters_file, "sha256": hashlib.sha256(data).hexdigest()}
    whole = {**head, **record}
    require_record(whole)
    folder = OwnedFolder(directory, WRITER)
    folder.check((clusters_file, record_file))
    # If the process is killed between two writes, the subset is not finished, but it never looks damaged.
    folder.remove(record_file)
    if folder.owns(official_file):
        folder.remove(official_file)  # it holds the old clusters
    folder.write(clusters_file, data)
    folder.write_json(record_file, whole)


def read_sampling(path: str | Path, methods: Sequence[str] = METHODS) -> Sampling:
    """Read a subset's clusters and its record.

    Args:
        path: `<subset>.parquet` or `<subset>.json`; the other is expected beside it.
        methods: The methods that are accepted.

    Returns:
        The clusters and the record, both checked: every row id is a row of the data, and no cluster names a row twice.

    Raises:
        SamplingError: A file is missing, damaged, of an unknown format or of another method.
    """
    given = Path(path).expanduser()
    record_path = given.with_suffix(".json")
    record = read_record(record_path)
    if record["method"] not in methods:
        needed = " or ".join(methods)
        raise SamplingError(f"{record_path}: sampled with --method {record['method']}, needed is {needed}; {AGAIN}")
    parquet = record_path.with_name(record["file"])
    try:
        if parquet.exists() and not parquet.is_file():
            raise SamplingError(f"{parquet}: no regular file; {ANEW}")
        data = parquet.read_bytes()
    except OSError as error:
        raise SamplingError(f"{parquet}: cannot be read ({error}); {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise SamplingError(
            f"{parquet}: damaged, its checksum differs from {record_path}; move both away, then {AGAIN}"
        )
    clusters = from_parquet(parquet, data, record)
    check(parquet, clusters, record["data"]["num_rows"])
    return Sampling(record_path, record, clusters)


def write_official(path: Path, clusters: SampledClusters, rows: Iterable[Mapping[str, Any]], method: str) -> None:
    """Write clusters in the official code's JSON form.

    Args:
        path: `<subset>_hard_negatives.json`.
        clusters: The clusters.
        rows: The training rows in order, in MMEB-train's columns.
        method: One of `METHODS`, except `in-batch`.

    Raises:
        ValueError: The method is `in-batch`, which that form cannot express.
    """
    if method == "in-batch":
        raise Gen2EmbedError("the official form holds hard negatives; pass --format parquet with --method in-batch")
    table = [dict(row) for row in rows]
    entries = []
    for anchor, members in zip(clusters.anchors.tolist(), clusters.members.tolist(), strict=True):
        chosen = [table[member] for member in members if member >= 0]
        if method == "saha":
            entries.append({**table[anchor], "neg_samples": chosen})
        else:
            texts, images = [row["pos_text"] for row in chosen], [row["pos_image_path"] for row in chosen]
            entries.append({**table[anchor], "neg_text": texts, "neg_image_path": images})
    data = (json.dumps(entries, indent=4, ensure_ascii=False) + "\n").encode()
    OwnedFolder(path.parent, WRITER).write(path.name, data)


def read_official(path: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[str, SampledClusters]:
    """Read clusters from the official code's JSON form, whichever program wrote it.

    Args:
        path: `<subset>_hard_negatives.json`.
        rows: The training rows in order, in MMEB-train's columns.

    Returns:
        The method, `saha` or `hn` (`hn-beta` cannot be told from it), and the clusters. Of equal rows, the last is
        taken, as in the official code; for a positive, the first row that has it. The file has no similarities (they
        are NaN here) and no phases: they are assumed to be 1 before the first cluster that repeats a row, then 2.

    Raises:
        SamplingError: The file is damaged, or a row of it is not in the training data.
    """
    by_row: dict[tuple[str, ...], int] = {}
    by_positive: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows):
        by_row[_row_key(row)] = number
        by_positive.setdefault((row["pos_text"], row["pos_image_path"]), number)
    method = "saha"
    anchors: list[int] = []
    lists: list[list[int]] = []
    try:
        if path.exists() and not path.is_file():
            raise Gen2EmbedError("no regular file")
        entries = json.loads(path.read_bytes())
        for entry in entries:
            anchors.append(by_row[_row_key(entry)])
            if "neg_samples" in entry:
                lists.append([by_row[_row_key(row)] for row in entry["neg_samples"]])
            else:
                method = "hn"
                negatives = zip(entry["neg_text"], entry["neg_image_path"], strict=True)
                lists.append([by_positive[negative] for negative in negatives])
            if len(lists[-1]) > MAX_HARD_NEGATIVES:
                raise Gen2EmbedError(f"entry {len(lists) - 1} has more than {MAX_HARD_NEGATIVES:,} negatives")
    except KeyError as error:
        raise SamplingError(
            f"{path}: entry {len(lists)}: {error} is not in this training data; pass --data_dir"
        ) from error
    except RecursionError as error:
        raise SamplingError(f"{path}: not in the official form (nested too deeply); {ANEW}") from error
    except (OSError, ValueError, TypeError) as error:
        raise SamplingError(f"{path}: not in the official form ({error}); {AGAIN} with --format official") from error
    members = np.full((len(lists), max(map(len, lists), default=0)), -1, dtype=np.int64)
    phase = np.ones(len(lists), dtype=np.int64)
    seen: set[int] = set()
    for number, (anchor, chosen) in enumerate(zip(anchors, lists, strict=True)):
        members[number, : len(chosen)] = chosen
        if method == "saha" and not seen.isdisjoint({anchor, *chosen}):
            phase[number:] = 2
        seen.update((anchor, *chosen))
    similarities = np.full(members.shape, np.nan, dtype=np.float32)
    return method, SampledClusters(np.array(anchors, dtype=np.int64), members, phase, similarities)


def _row_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    columns = ("qry", "qry_image_path", "pos_text", "pos_image_path")
    missing = [column for column in columns if column not in row]
    if missing:
        raise Gen2EmbedError(f"a row has no {missing[0]}")
    return tuple(row[column] for column in columns)
