"""The Parquet file of a subset's clusters, read and written; `files.py` says what its columns mean."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from trainers.sampling.records import AGAIN, ANEW, SamplingError


@dataclass(frozen=True)
class SampledClusters:
    """Clusters in row ids of the training data.

    Attributes:
        anchors: (C,) int64.
        members: (C, k) int64, -1 where a cluster is short; k is 0 for `in-batch`.
        phase: (C,) int64, 1 or 2.
        similarities: (C, k) float32, NaN where a member is -1 or its similarity is not known.
        places: (C, k) int64, which positive of a member is meant, -1 where a member is -1; None where it is the first.
    """

    anchors: npt.NDArray[np.int64]
    members: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]
    places: npt.NDArray[np.int64] | None = None


def as_parquet(clusters: SampledClusters) -> bytes:
    """Return the content of the Parquet file; equal clusters are equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    real = clusters.members >= 0
    offsets = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int32)
    columns = {
        "anchor": pa.array(clusters.anchors, pa.int64()),
        "members": pa.ListArray.from_arrays(offsets, pa.array(clusters.members[real], pa.int64())),
        "phase": pa.array(clusters.phase.astype(np.int8), pa.int8()),
        "similarities": pa.ListArray.from_arrays(offsets, pa.array(clusters.similarities[real], pa.float32())),
    }
    if clusters.places is not None:
        columns["places"] = pa.ListArray.from_arrays(offsets, pa.array(clusters.places[real], pa.int64()))
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(path: Path, data: bytes, record: Mapping[str, Any]) -> SampledClusters:
    """Return the clusters of a Parquet file.

    Args:
        path: The file, for messages.
        data: Its content.
        record: The subset's record, whose counts are compared.

    Raises:
        SamplingError: It is no such file, or its record is of another.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not `read_table`: its read-ahead threads may release `data` only when the interpreter has ended, and abort.
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        has_places = "places" in file.schema_arrow.names
        names = ["anchor", "members", "phase", "similarities", *(["places"] if has_places else [])]
        table = file.read(names, use_threads=False)
        anchors = _numbers(table["anchor"], np.int64)
        phase = _numbers(table["phase"], np.int64)
        lists = {name: table[name].combine_chunks() for name in names if name not in ("anchor", "phase")}
        lengths = {name: np.diff(np.asarray(column.offsets)) for name, column in lists.items()}
        if any(column.null_count for column in lists.values()):
            raise Gen2EmbedError("a list is null")
        members_in = _numbers(lists["members"].flatten(), np.int64)
        similarities_in = _numbers(lists["similarities"].flatten(), np.float32)
        places_in = _numbers(lists["places"].flatten(), np.int64) if has_places else None
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamplingError(f"{path}: not a file of clusters ({error}); {ANEW}") from error
    width = record["settings"]["num_hard_negatives"]
    same = all(np.array_equal(lengths["members"], of_list) for of_list in lengths.values())
    if not same or lengths["members"].max(initial=0) > width:
        raise SamplingError(f"{path}: members and similarities do not match; {ANEW}")
    # This is compared before the table is made: a wrong k in the record could make the table too wide for memory.
    found = {"clusters": len(anchors), "short": int((lengths["members"] < width).sum())}
    for name, count in found.items():
        if record["counts"][name] != count:
            raise SamplingError(
                f"{path}: {count:,} {name} with k = {width}, but its record says {record['counts'][name]:,}; "
                f"move both away, then {AGAIN}"
            )
    width = width if len(members_in) else 0
    real = np.arange(width) < lengths["members"][:, None]
    members = np.full(real.shape, -1, dtype=np.int64)
    similarities = np.full(real.shape, np.nan, dtype=np.float32)
    members[real], similarities[real] = members_in, similarities_in
    places = None
    if places_in is not None:
        places = np.full(real.shape, -1, dtype=np.int64)
        places[real] = places_in
    return SampledClusters(anchors, members, phase, similarities, places)


def _numbers(column: Any, dtype: Any) -> npt.NDArray[Any]:
    """Return a column's values as numbers; a null or a text among them raises an error."""
    if column.null_count:
        raise Gen2EmbedError("a value is null")
    values = column.to_numpy(zero_copy_only=False) if not hasattr(column, "chunks") else column.to_numpy()
    if values.dtype.kind not in ("iu" if np.issubdtype(dtype, np.integer) else "f"):
        raise Gen2EmbedError(f"{values.dtype} where {np.dtype(dtype)} is expected")
    return np.asarray(values.astype(dtype))


def check(path: Path, clusters: SampledClusters, num_rows: int) -> None:
    """Check that clusters name rows of the data, and no row twice.

    Args:
        path: The file, for messages.
        clusters: What was read.
        num_rows: The number of rows of the data.

    Raises:
        SamplingError: They do not.
    """
    rows = np.column_stack([clusters.anchors, clusters.members])
    real = np.column_stack([np.ones(len(rows), dtype=bool), clusters.members != -1])
    wrong = real & ((rows < 0) | (rows >= num_rows))
    if wrong.any():
        cluster, place = np.argwhere(wrong)[0]
        raise SamplingError(
            f"{path}: cluster {cluster} names row {rows[cluster, place]}, but the data has {num_rows} rows; {AGAIN}"
        )
    twice = _repeats(rows)
    if clusters.places is not None:
        if (clusters.places[real[:, 1:]] < 0).any():
            raise SamplingError(f"{path}: a place is negative; {AGAIN}")
        # A row may be named for two of its positives, but never for one of them twice.
        most = int(clusters.places.max(initial=0)) + 1
        named = np.where(real[:, 1:], clusters.members * most + clusters.places, -1)
        twice = _repeats(named) | (clusters.members == clusters.anchors[:, None]).any(axis=1)
    if twice.any():
        raise SamplingError(f"{path}: cluster {np.flatnonzero(twice)[0]} names a row twice; {AGAIN}")
    if not np.isin(clusters.phase, (1, 2)).all():
        raise SamplingError(f"{path}: a phase is neither 1 nor 2; {AGAIN}")


def _repeats(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Say of each row whether it names a number above -1 twice."""
    ordered = np.sort(rows, axis=1)
    found: npt.NDArray[np.bool_] = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    return found
