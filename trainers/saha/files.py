"""What `gen2embed sample` writes and training reads, a subset at a time.

`<subset>.parquet` has one row a cluster, in the order in which the clusters were formed:

| column         | type          |                                                                                   |
|----------------|---------------|-----------------------------------------------------------------------------------|
| `anchor`       | int64         | the anchor's row id                                                               |
| `members`      | list<int64>   | row ids, in the order of the method; a short cluster has a shorter list           |
| `phase`        | int8          | 1 or 2 (Algorithm 1); 1 for the other methods                                     |
| `similarities` | list<float32> | one a member: of the anchor's query to what `MEANING` says                        |

A row id is the number of a row in the split of the training data, from 0. Nothing is copied out of that data;
training reads the rows from where they are.

`<subset>.json`, the record, names the data (with a digest of its rows), the model (with its fingerprint), every
setting, the counts and the Parquet file's checksum. It is written last: a subset is finished when its record is there.

`<subset>_hard_negatives.json` is the official code's form, for programs that read it: a list of training rows, each
with its members' rows under `neg_samples`, or, for plain hard negatives, with lists as `neg_text` and `neg_image_path`.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from gen2embed_mteb.store import write_atomic, write_json

FORMAT = 1
_ONLY_POSITIVE = (
    "of a member only its positive is meant, a hard negative of the anchor; similarity of query and negative"
)
METHODS = ("saha", "hn", "hn-beta", "in-batch")
MEANING = {
    "saha": "members are whole pairs: every query of a cluster meets every positive of it; similarity of the queries",
    "hn": _ONLY_POSITIVE,
    "hn-beta": _ONLY_POSITIVE,
    "in-batch": "every row is alone; its negatives are what else is in the batch",
}
OFFICIAL_SUFFIX = "_hard_negatives.json"
_AGAIN = "run gen2embed sample again"


class SamplingError(Gen2EmbedError):
    """A sampling file that cannot be used; the message names the file, the fault and the remedy."""


@dataclass(frozen=True)
class SampledClusters:
    """Clusters in row ids of the training data.

    Attributes:
        anchors: (C,) int64.
        members: (C, k) int64, -1 where a cluster is short; k is 0 for `in-batch`.
        phase: (C,) int64, 1 or 2.
        similarities: (C, k) float32, NaN where a member is -1 or its similarity is not known.
    """

    anchors: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """A subset's clusters, and how they came about.

    Attributes:
        path: The record.
        record: Its content.
        clusters: The clusters.
    """

    path: Path
    record: dict[str, Any]
    clusters: SampledClusters

    def require_data(self, digest: str) -> None:
        """Checks that row ids refer to the data at hand.

        Args:
            digest: `RowsDigest` of its rows.

        Raises:
            SamplingError: The clusters were made with other rows.
        """
        if self.record["data"]["digest"] != digest:
            data = self.record["data"]
            raise SamplingError(
                f"{self.path}: made with other rows than these; it used {data['source']}, split {data['split']!r}, "
                f"limit {data['limit']}. Pass that data, or {_AGAIN} on this"
            )


class RowsDigest:
    """Digests training rows in order: row numbers, texts, image paths."""

    def __init__(self) -> None:
        """Begins."""
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, row: TrainRow | BadRow) -> None:
        """Takes the next row."""
        content = [row.index, row.query, row.positive] if isinstance(row, TrainRow) else [row.index]
        self._digest.update(json.dumps(content).encode() + b"\n")

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.hexdigest()


def write_sampling(directory: Path, record: Mapping[str, Any], clusters: SampledClusters) -> None:
    """Writes a subset's Parquet file, then its record; equal clusters are equal bytes.

    Args:
        directory: The folder; must exist.
        record: The record's content, with `subset`, `method`, `settings`, `data`, `model`, `counts`.
        clusters: The clusters.
    """
    data = _as_parquet(clusters)
    name = f"{record['subset']}.parquet"
    # A kill between two writes leaves a subset that is not finished, never one that looks damaged.
    (directory / f"{record['subset']}.json").unlink(missing_ok=True)
    write_atomic(directory / name, data)
    head = {"format": FORMAT, "subset": record["subset"], "method": record["method"]}
    head |= {"meaning": MEANING[record["method"]], "file": name, "sha256": hashlib.sha256(data).hexdigest()}
    write_json(directory / f"{record['subset']}.json", {**head, **record})


def _as_parquet(clusters: SampledClusters) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    real = clusters.members >= 0
    offsets = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)
    table = pa.table(
        {
            "anchor": pa.array(clusters.anchors, pa.int64()),
            "members": pa.ListArray.from_arrays(offsets, pa.array(clusters.members[real], pa.int64())),
            "phase": pa.array(clusters.phase.astype(np.int8), pa.int8()),
            "similarities": pa.ListArray.from_arrays(offsets, pa.array(clusters.similarities[real], pa.float32())),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record.

    Args:
        path: `<subset>.json`.

    Returns:
        Its content.

    Raises:
        SamplingError: It is missing or damaged, of an unknown format, or of an unknown method.
    """
    try:
        record = json.loads(path.read_bytes())
        version, method = record["format"], record["method"]
        complete = all(record[key] is not None for key in ("file", "sha256"))
        for section, keys in (
            ("settings", ("num_hard_negatives",)),
            ("data", ("num_rows", "digest", "source", "split", "limit")),
            ("model", ("fingerprint",)),
            ("counts", ("errors",)),
        ):
            complete &= all(key in record[section] for key in keys)
    except FileNotFoundError as error:
        raise SamplingError(f"{path}: not found; pass a file that gen2embed sample wrote, or {_AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SamplingError(f"{path}: no record of a sampling run ({error!r}); {_AGAIN} with --overwrite") from error
    if version != FORMAT:
        raise SamplingError(f"{path}: format {version}, this version reads {FORMAT}; update gen2embed, or {_AGAIN}")
    if method not in METHODS or not complete:
        raise SamplingError(f"{path}: method {method!r}; known: {', '.join(METHODS)}. To mend it, {_AGAIN}")
    return dict(record)


def read_sampling(path: str | Path, methods: Sequence[str] = METHODS) -> Sampling:
    """Reads a subset's clusters and its record.

    Args:
        path: `<subset>.parquet` or `<subset>.json`; the other is expected beside it.
        methods: The methods that will do.

    Returns:
        Both, checked: every row id is a row of the data, and no cluster names a row twice.

    Raises:
        SamplingError: A file is missing, damaged, of an unknown format or of another method.
    """
    given = Path(path).expanduser()
    record_path = given.with_suffix(".json")
    record = read_record(record_path)
    if record["method"] not in methods:
        needed = " or ".join(methods)
        raise SamplingError(f"{record_path}: sampled with --method {record['method']}, needed is {needed}; {_AGAIN}")
    parquet = record_path.with_name(Path(record["file"]).name)
    try:
        data = parquet.read_bytes()
    except OSError as error:
        raise SamplingError(f"{parquet}: cannot be read ({error}); {_AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise SamplingError(f"{parquet}: damaged, its checksum differs from {record_path}; {_AGAIN} with --overwrite")
    clusters = _from_parquet(parquet, data, record["settings"]["num_hard_negatives"])
    _check(parquet, clusters, record["data"]["num_rows"])
    return Sampling(record_path, record, clusters)


def _from_parquet(path: Path, data: bytes, width: int) -> SampledClusters:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not `read_table`: its read-ahead threads may let go of `data` only after the interpreter is gone, and abort.
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        table = file.read(["anchor", "members", "phase", "similarities"], use_threads=False)
        anchors = table["anchor"].to_numpy().astype(np.int64)
        phase = table["phase"].to_numpy().astype(np.int64)
        lists = {name: table[name].combine_chunks() for name in ("members", "similarities")}
        lengths = {name: np.diff(np.asarray(column.offsets)) for name, column in lists.items()}
        values = {name: np.asarray(column.flatten()) for name, column in lists.items()}
    except (pa.ArrowException, ValueError, KeyError, AttributeError) as error:
        raise SamplingError(f"{path}: not a file of clusters ({error}); {_AGAIN} with --overwrite") from error
    if not np.array_equal(lengths["members"], lengths["similarities"]) or lengths["members"].max(initial=0) > width:
        raise SamplingError(f"{path}: members and similarities do not match; {_AGAIN} with --overwrite")
    width = width if len(values["members"]) else 0
    real = np.arange(width) < lengths["members"][:, None]
    members = np.full(real.shape, -1, dtype=np.int64)
    similarities = np.full(real.shape, np.nan, dtype=np.float32)
    members[real], similarities[real] = values["members"], values["similarities"]
    return SampledClusters(anchors, members, phase, similarities)


def _check(path: Path, clusters: SampledClusters, num_rows: int) -> None:
    rows = np.column_stack([clusters.anchors, clusters.members])
    real = np.column_stack([np.ones(len(rows), dtype=bool), clusters.members != -1])
    wrong = real & ((rows < 0) | (rows >= num_rows))
    if wrong.any():
        cluster, place = np.argwhere(wrong)[0]
        raise SamplingError(
            f"{path}: cluster {cluster} names row {rows[cluster, place]}, but the data has {num_rows} rows; {_AGAIN}"
        )
    ordered = np.sort(rows, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise SamplingError(f"{path}: cluster {np.flatnonzero(twice)[0]} names a row twice; {_AGAIN}")
    if not np.isin(clusters.phase, (1, 2)).all():
        raise SamplingError(f"{path}: a phase is neither 1 nor 2; {_AGAIN}")


def write_official(path: Path, clusters: SampledClusters, rows: Iterable[Mapping[str, Any]], method: str) -> None:
    """Writes the official code's JSON.

    Args:
        path: `<subset>_hard_negatives.json`.
        clusters: The clusters.
        rows: The training rows in order, in MMEB-train's columns.
        method: One of `METHODS`, but `in-batch`.

    Raises:
        ValueError: The method is `in-batch`, which that form has no place for.
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
    write_atomic(path, (json.dumps(entries, indent=4, ensure_ascii=False) + "\n").encode())


def read_official(path: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[str, SampledClusters]:
    """Reads the official code's JSON, whoever wrote it.

    Args:
        path: `<subset>_hard_negatives.json`.
        rows: The training rows in order, in MMEB-train's columns.

    Returns:
        The method, `saha` or `hn` (which `hn-beta` looks like), and the clusters. Of rows that are equal, the last is
        taken, as in the official code; of positives, the first row that has them. Similarities are not in the file
        (NaN), and phases neither: they are taken to be 1 until the first cluster that repeats a row, and 2 from there.

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
        entries = json.loads(path.read_bytes())
        for entry in entries:
            anchors.append(by_row[_row_key(entry)])
            if "neg_samples" in entry:
                lists.append([by_row[_row_key(row)] for row in entry["neg_samples"]])
            else:
                method = "hn"
                negatives = zip(entry["neg_text"], entry["neg_image_path"], strict=True)
                lists.append([by_positive[negative] for negative in negatives])
    except KeyError as error:
        raise SamplingError(
            f"{path}: entry {len(lists)}: {error} is not in this training data; pass --data_dir"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise SamplingError(f"{path}: not in the official form ({error}); {_AGAIN} with --format official") from error
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
