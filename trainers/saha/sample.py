"""Sampling training data, subset by subset: read, encode both sides, choose negatives, write.

1. A subset whose record is there, made from the same rows with the same settings by the same model, is finished and
   left alone, unless rows of it were set aside: those are tried again. One that was made otherwise is refused, or
   replaced with `overwrite`.
2. Queries and distinct candidates are encoded (`encoding.py`), each subset on its own: were vectors shared between
   subsets, the batches of one would depend on which others are finished, and with them the last bits of its vectors.
3. Rows whose query or positive has no vector are set aside, counted and reported; the rest is mined.
4. The Parquet file is written, then the record.

Several processes (`torchrun`) share the second step; the first of them does the rest. A run that is killed at any
moment and started again ends in the same Parquet files, to the byte.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.encoder import Encoder, Fault, Item
from gen2embed_mteb.encoding import BulkEncoder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation import (
    EncodingConfig,
    RowError,
    RunSummary,
    installed_versions,
    is_first_process,
    open_bulk_encoder,
    setting,
    write_errors,
)
from gen2embed_mteb.formatting import as_text
from gen2embed_mteb.mini.benchmark import MMEB_MINI
from gen2embed_mteb.mmeb import MMEB
from gen2embed_mteb.mmeb.readers import BadRow, TrainRow
from trainers.data import DataConfig, MmebSubset, TrainingData, TrainingSubset
from trainers.negatives import hard_negatives
from trainers.saha.clusters import Variant, mine_clusters
from trainers.saha.files import (
    METHODS,
    OFFICIAL_SUFFIX,
    RowsDigest,
    SampledClusters,
    SamplingError,
    read_sampling,
    write_official,
    write_sampling,
)

logger = logging.getLogger(__name__)

FORMATS = ("parquet", "official")
LABELLED = frozenset(
    name
    for benchmark in (MMEB, MMEB_MINI)
    for dataset in benchmark.datasets
    if dataset.meta_task == "Classification"
    for name in (dataset.name, dataset.train_name or dataset.name)
)
"""Classification subsets, whose candidates are labels; the official code does not re-rank those of MMEB."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig(DataConfig, EncodingConfig):
    """The settings of one sampling run."""

    output_dir: str = setting("folder for the sampling files; made if missing")
    embedding_dir: str = setting("folder of the vectors; empty: `embeddings` in output_dir", default="")
    method: str = setting("how negatives are chosen: saha, hn, hn-beta, in-batch", default="saha")
    variant: Variant = field(default="paper", metadata={"help": "of Algorithm 1: paper or official"})
    num_hard_negatives: int = setting("k, hard negatives a query", default=7)
    pool_multiplier: int = setting("m; saha's pool holds m k candidates", default=6)
    beta: float = setting("margin of hn-beta", default=0.02)
    file_format: str = setting("parquet, or official for the official code's JSON as well", default="parquet")

    def __post_init__(self) -> None:
        """Checks every value, so that a run never fails on one hours later.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        DataConfig.__post_init__(self)
        EncodingConfig.__post_init__(self)
        for name in ("num_hard_negatives", "pool_multiplier"):
            if getattr(self, name) < 1:
                raise Gen2EmbedError(f"{name} is {getattr(self, name)}; pass 1 or more")
        if not -2 <= self.beta <= 2:
            raise Gen2EmbedError(f"beta is {self.beta}; pass a difference of two cosines, such as 0.02")
        known = {"method": METHODS, "variant": get_args(Variant), "file_format": FORMATS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise Gen2EmbedError(f"{name} is {getattr(self, name)!r}; known: {', '.join(values)}")
        if self.file_format == "official" and self.method == "in-batch":
            raise Gen2EmbedError("the official form holds hard negatives; pass --format parquet with --method in-batch")
        if not self.output_dir:
            raise Gen2EmbedError("output_dir is empty; pass a folder")

    @property
    def images_cache(self) -> Path:
        """Where images are kept that the data embeds."""
        return Path(self.output_dir) / "images-cache"

    def decisive(self, subset: str) -> dict[str, Any]:
        """The settings that decide a subset's clusters; None where the method does not use one."""
        saha = self.method == "saha"
        return {
            "num_hard_negatives": 0 if self.method == "in-batch" else self.num_hard_negatives,
            "pool_multiplier": self.pool_multiplier if saha else None,
            "variant": self.variant if saha else None,
            "labelled": saha and self.variant == "official" and subset in LABELLED,
            "beta": self.beta if self.method == "hn-beta" else None,
            "resize": self.resize,
            "min_side": self.min_side,
        }


@dataclass(frozen=True)
class ModelRecord:
    """What the record says of the model.

    Attributes:
        name: Its name or path.
        revision: Its revision on the Hub, if any.
        prompt_mode: The prompt strategy.
        fingerprint: Digest of everything that decides its vectors; empty for `in-batch`, which has no use of a model.
    """

    name: str = ""
    revision: str = ""
    prompt_mode: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleResult(RunSummary):
    """A finished run.

    Attributes:
        records: One record a subset, in order, as `files.py` describes them.
        made: The names of the subsets that this run made; the others were finished before.
    """

    records: tuple[dict[str, Any], ...]
    made: tuple[str, ...]


def sample(encoder: Encoder | None, model: ModelRecord, data: TrainingData, config: SampleConfig) -> SampleResult:
    """Samples every subset and writes its files into `config.output_dir`.

    Args:
        encoder: The model; None will do for `in-batch`.
        model: What the records say of it.
        data: The opened training data (`open_training_data`).
        config: The run's settings.

    Returns:
        The result; look at `too_many_errors`.

    Raises:
        DataError: A table is damaged.
        SamplingError: A subset's files were made with other settings, data or model, or are damaged.
        StoreMismatchError: The vectors belong to another model or image policy.
        ValueError: There is no encoder, and the method needs one; or the official form is asked for other data than
            MMEB-train's.
    """
    start = time.monotonic()
    if config.method != "in-batch" and (encoder is None or not model.fingerprint):
        raise Gen2EmbedError(f"method {config.method} needs an encoder and its fingerprint")
    if config.method == "in-batch":
        model = ModelRecord()  # whichever it is, the rows are the same
    if config.file_format == "official":
        _official_subsets(data.subsets)
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    runs = [_SubsetRun(subset, data, model, config) for subset in data.subsets]
    # All are compared before the first is made: a refusal after hours would be late.
    finished = {run.subset.name: found for run in runs if (found := run.finished()) is not None}
    if not is_first_process():
        return _encode_share(encoder, [run for run in runs if run.subset.name not in finished], config, start)
    others = {run.subset.name for run in runs} - finished.keys()
    errors = {name: listed for name, listed in _known_errors(output_dir).items() if name not in others}
    for run in runs:
        name = run.subset.name
        if name not in finished:
            record, clusters, rejected = run.make(encoder)
            errors[name] = rejected
            # The record comes last: with it the subset counts as finished, and its errors must be kept by then.
            write_errors(output_dir, _in_order(errors))
            (output_dir / (name + OFFICIAL_SUFFIX)).unlink(missing_ok=True)  # of a run that is replaced
            write_sampling(output_dir, record, clusters)
        if config.file_format == "official":
            run.write_official()
    write_errors(output_dir, _in_order(errors))
    records = tuple(read_sampling(output_dir / f"{run.subset.name}.json").record for run in runs)
    return SampleResult(
        num_scored=sum(record["counts"]["queries"] for record in records),
        errors=tuple(error for run in runs for error in errors.get(run.subset.name, [])),
        seconds=time.monotonic() - start,
        max_error_rate=config.max_error_rate,
        records=records,
        made=tuple(run.subset.name for run in runs if run.subset.name not in finished),
    )


def _encode_share(
    encoder: Encoder | None, runs: Sequence[_SubsetRun], config: SampleConfig, start: float
) -> SampleResult:
    """What every process but the first does; it has nothing to report."""
    if encoder is not None and config.method != "in-batch":
        for run in runs:
            run.encode_share(encoder)
    seconds = time.monotonic() - start
    return SampleResult(
        num_scored=0, errors=(), seconds=seconds, max_error_rate=config.max_error_rate, records=(), made=()
    )


def _official_subsets(subsets: Sequence[TrainingSubset]) -> None:
    for subset in subsets:
        if not isinstance(subset, MmebSubset):
            raise Gen2EmbedError(
                f"{subset.source}: the official form holds rows of MMEB-train's; pass --format parquet for other data"
            )


class _Read(NamedTuple):
    """A subset's rows: the usable ones, the others, how many there are and were collapsed, and their digest."""

    rows: list[TrainRow]
    rejected: list[BadRow]
    num_rows: int
    num_collapsed: int
    digest: str


class _SubsetRun:
    """One subset of a run: its rows, and what is made of them."""

    def __init__(self, subset: TrainingSubset, data: TrainingData, model: ModelRecord, config: SampleConfig) -> None:
        self.subset = subset
        self._data, self._model, self._config = data, model, config
        self._path = Path(config.output_dir) / f"{subset.name}.json"

    def finished(self) -> dict[str, Any] | None:
        """The record of this subset if it is done; None if it is to be made.

        Raises:
            SamplingError: It was made otherwise, and may not be replaced.
        """
        if not self._path.exists():
            return None
        try:
            record = read_sampling(self._path).record
        except SamplingError:
            if not self._config.overwrite:
                raise
            return None
        digest = RowsDigest()
        for row in self.subset.rows():
            digest.add(row)
        now = {
            "method": self._config.method,
            **self._config.decisive(self.subset.name),
            "data": digest.hexdigest(),
            "model": self._model.fingerprint,
        }
        then = {
            "method": record["method"],
            **record["settings"],
            "data": record["data"]["digest"],
            "model": record["model"]["fingerprint"],
        }
        differing = [
            f"{name} was {then.get(name)!r}, now {value!r}" for name, value in now.items() if then.get(name) != value
        ]
        if not differing:
            # An image that could not be opened may have been repaired since; if not, the vectors are all there.
            return None if record["counts"]["errors"] else record
        if not self._config.overwrite:
            raise SamplingError(
                f"{self._path}: made by another run ({'; '.join(differing)}); pass another --output_dir, or --overwrite"
            )
        logger.warning("%s: replaced, as it was made by another run (%s)", self._path, "; ".join(differing))
        return None

    def encode_share(self, encoder: Encoder) -> None:
        """Makes this process's share of the vectors."""
        self._encode(encoder, self._read().rows)

    def make(self, encoder: Encoder | None) -> tuple[dict[str, Any], SampledClusters, list[RowError]]:
        """Encodes and mines."""
        start = time.monotonic()
        read = self._read()
        faults: dict[int, Fault] = {}
        bulk = None
        if encoder is not None and self._config.method != "in-batch":
            bulk = self._encode(encoder, read.rows)
            for row in read.rows:
                fault = bulk.fault("query", row.query) or bulk.fault("document", row.positive)
                if fault:
                    faults[row.index] = fault
        rows = [row for row in read.rows if row.index not in faults]
        encoded = time.monotonic()
        clusters, num_candidates = self._mine(bulk, rows)
        mined = time.monotonic()
        rejected = [RowError(self.subset.name, bad.index, bad.file, bad.reason) for bad in read.rejected]
        rejected += [
            RowError(self.subset.name, index, fault.file or self.subset.source, fault.reason)
            for index, fault in faults.items()
        ]
        rejected.sort(key=lambda error: error.row)
        seconds = {"encode": round(encoded - start, 2), "mine": round(mined - encoded, 2)}
        counts = {
            "rows": read.num_rows,
            "queries": len(rows),
            "candidates": num_candidates,
            "collapsed": read.num_collapsed,
            "errors": len(rejected),
            **_counts(clusters, self._config.method),
        }
        return self._record(read, counts, seconds), clusters, rejected

    def _read(self) -> _Read:
        digest = RowsDigest()
        rows: list[TrainRow] = []
        rejected: list[BadRow] = []
        for row in self.subset.rows():
            digest.add(row)
            if isinstance(row, BadRow):
                rejected.append(row)
            else:
                rows.append(row)
        kept = rows
        if self._config.method == "saha" and self._config.variant == "official":
            # A query keeps its first place and its last row, as there.
            kept = list({row.query: row for row in rows}.values())
        return _Read(kept, rejected, len(rows) + len(rejected), len(rows) - len(kept), digest.hexdigest())

    def _record(self, read: _Read, counts: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
        config = self._config
        return {
            "subset": self.subset.name,
            "method": config.method,
            "settings": config.decisive(self.subset.name),
            "data": {
                "data_dir": config.data_dir,
                "image_dir": config.image_dir,
                "source": self.subset.source,
                "split": self._data.split,
                "columns": list(config.columns),
                "image_columns": list(config.image_columns),
                "limit": config.limit,
                "num_rows": read.num_rows,
                "digest": read.digest,
            },
            "model": vars(self._model),
            "counts": counts,
            "versions": installed_versions(),
            "seconds": seconds,
        }

    def _encode(self, encoder: Encoder, rows: list[TrainRow]) -> BulkEncoder:
        config, name = self._config, self.subset.name
        folder = Path(config.embedding_dir or Path(config.output_dir) / "embeddings")
        bulk = open_bulk_encoder(encoder, config, self._data.images, folder=folder, fingerprint=self._model.fingerprint)
        bulk.add("query", [row.query for row in rows], f"{name} queries")
        bulk.add("document", [row.positive for row in rows], f"{name} candidates")
        return bulk

    def _mine(self, bulk: BulkEncoder | None, rows: list[TrainRow]) -> tuple[SampledClusters, int]:
        """Chooses negatives; returns them in row ids, and the number of distinct candidates."""
        config = self._config
        numbers: dict[Item, int] = {}
        firsts: dict[Hashable, Item] = {}
        # Copies of one picture under several names are one candidate: else a query's negative could be its positive.
        kept = [firsts.setdefault(bulk.content(row.positive) if bulk else row.positive, row.positive) for row in rows]
        positives = np.array([numbers.setdefault(item, len(numbers)) for item in kept], dtype=np.int64)
        ids = np.array([row.index for row in rows], dtype=np.int64)
        first_phase = np.ones(len(rows), dtype=np.int64)
        if bulk is None or not rows:
            nobody = np.zeros((len(rows), 0), dtype=np.int64)
            return SampledClusters(ids, nobody, first_phase, nobody.astype(np.float32)), len(numbers)
        queries = bulk.vectors("query", [row.query for row in rows])
        candidates = bulk.vectors("document", list(numbers))
        if config.method == "saha":
            mined = mine_clusters(
                queries,
                candidates,
                positives,
                num_hard_negatives=config.num_hard_negatives,
                pool_multiplier=config.pool_multiplier,
                variant=config.variant,
                labelled=config.decisive(self.subset.name)["labelled"],
            )
            members = _as_ids(mined.members, ids)
            return SampledClusters(ids[mined.anchors], members, mined.phase, mined.similarities), len(numbers)
        beta = config.beta if config.method == "hn-beta" else None
        found = hard_negatives(queries, candidates, positives, config.num_hard_negatives, beta)
        # The first row that has a candidate stands for it.
        owners = np.zeros(len(numbers), dtype=np.int64)
        owners[positives[::-1]] = ids[::-1]
        return SampledClusters(ids, _as_ids(found.candidates, owners), first_phase, found.similarities), len(numbers)

    def write_official(self) -> None:
        """Writes the official code's form of a finished subset."""
        if not isinstance(self.subset, MmebSubset):
            raise TypeError(f"{self.subset.source}: not in MMEB-train's form")
        sampling = read_sampling(self._path)
        path = self._path.with_name(self.subset.name + OFFICIAL_SUFFIX)
        write_official(path, sampling.clusters, self.subset.columns(), self._config.method)


def _as_ids(members: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where(members >= 0, ids[members], -1)


def _counts(clusters: SampledClusters, method: str) -> dict[str, int]:
    real = clusters.members >= 0
    if method == "saha":
        rows = np.concatenate([clusters.anchors, clusters.members[real]])
        reused = int((np.unique(rows, return_counts=True)[1] > 1).sum())
    else:
        reused = 0  # queries of the baselines are anchors only
    return {
        "clusters": len(clusters.anchors),
        "phase_1": int((clusters.phase == 1).sum()),
        "phase_2": int((clusters.phase == 2).sum()),
        "short": int((real.sum(axis=1) < clusters.members.shape[1]).sum()),
        "reused": reused,
    }


def _in_order(errors: Mapping[str, list[RowError]]) -> list[RowError]:
    """By subset and row, so that the file does not tell which subset was made when."""
    return [error for name in sorted(errors) for error in errors[name]]


def _known_errors(output_dir: Path) -> dict[str, list[RowError]]:
    """The rows that earlier runs set aside, by subset."""
    path = output_dir / "errors.jsonl"
    known: dict[str, list[RowError]] = {}
    if path.is_file():
        try:
            errors = [RowError(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError) as error:
            raise SamplingError(f"{path}: damaged ({error}); remove it") from error
        for rejected in errors:
            known.setdefault(rejected.dataset, []).append(rejected)
    return known


def text_table(result: SampleResult) -> str:
    """The run as a table for the terminal.

    Args:
        result: The run's outcome.

    Returns:
        One line a subset, and their sum where there are several.
    """
    columns = ("rows", "queries", "candidates", "phase_1", "phase_2", "short", "reused", "errors")
    rows = []
    for record in result.records:
        figures: list[float] = [record["counts"][name] for name in columns]
        rows.append((record["subset"], [*figures, record["seconds"]["encode"], record["seconds"]["mine"]]))
    if len(rows) > 1:
        rows.append(("total", [sum(column) for column in zip(*(figures for _, figures in rows), strict=True)]))
    header = ["subset", *(name.replace("_", " ") for name in columns), "encode s", "mine s"]
    return as_text([header, *([name, *map(_figure, figures)] for name, figures in rows)])


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
