"""Samples training data, subset by subset: reads the rows, encodes both sides, chooses negatives, writes the files.

1. A subset is finished if its record is there and was made from the same rows with the same settings by the same model.
   It is left as it is, unless some of its rows were set aside: then it is made again, as they may be readable now. A
   subset that was made otherwise is refused, or replaced with `overwrite`.
2. Queries and distinct candidates are encoded (`bulk/encoder.py`), each subset on its own. If subsets shared vectors,
   the batches of one subset would depend on which others are finished, and so would the last bits of its vectors.
3. Rows whose query or positive has no vector are set aside, counted and reported; the rest is mined.
4. The Parquet file is written, then the record.

Several processes (`torchrun`) share the second step; the first of them does the rest. If a run is killed at any moment
and started again, it ends in the same Parquet files, to the byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RunSummary, is_first_process, refuse_images
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.storage.atomic import remove_stale
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.data.training_data import MmebSubset, TrainingData, TrainingSubset
from trainers.sampling.config import ModelRecord, SampleConfig
from trainers.sampling.files import WRITER, read_sampling, write_sampling
from trainers.sampling.outputs import ERRORS, check_outputs, known_errors, write_known_errors
from trainers.sampling.subset import SubsetRun

__all__ = ["ModelRecord", "SampleConfig", "SampleResult", "sample", "text_table"]


@dataclass(frozen=True, kw_only=True)
class SampleResult(RunSummary):
    """The result of a sampling run.

    Attributes:
        records: One record per subset, in order, as `files.py` describes them.
        made: The names of the subsets that this run made; the others were finished before.
    """

    records: tuple[dict[str, Any], ...]
    made: tuple[str, ...]


def sample(encoder: Encoder | None, model: ModelRecord, data: TrainingData, config: SampleConfig) -> SampleResult:
    """Sample every subset and write its files into `config.output_dir`.

    Args:
        encoder: The model; it may be None for `in-batch`.
        model: What the records say about the model.
        data: The opened training data (`open_training_data`).
        config: The run's settings.

    Returns:
        The result; its `too_many_errors` says whether more rows were set aside than the settings allow.

    Raises:
        DataError: A table is damaged.
        ForeignFileError: The run would replace a file that `sample` did not write, or that was changed since.
        SamplingError: A subset's files were made with other settings, data or model, or are damaged.
        StoreMismatchError: The vectors belong to another model or image policy.
        ValueError: There is no encoder, and the method needs one; it takes text alone, and a subset has images; or the
            official form is wanted, and the data is not in MMEB-train's form.
    """
    start = time.monotonic()
    if config.method != "in-batch" and (encoder is None or not model.fingerprint):
        raise Gen2EmbedError(f"method {config.method} needs an encoder and its fingerprint")
    if config.method == "in-batch":
        model = ModelRecord()  # the clusters do not depend on the model
    else:
        text_alone = getattr(encoder, "text_alone", "")
        refuse_images(text_alone, {subset.name: subset.has_images for subset in data.subsets})
    if config.file_format == "official":
        _official_subsets(data.subsets)
    if is_first_process():
        check_outputs(data, config)
    output_dir = config.folder
    output_dir.mkdir(parents=True, exist_ok=True)
    runs = [SubsetRun(subset, data, model, config) for subset in data.subsets]
    # All subsets are compared before the first is made, so that a refusal does not come after hours of work.
    finished = {run.subset.name: found for run in runs if (found := run.finished()) is not None}
    if not is_first_process():
        return _encode_share(encoder, [run for run in runs if run.subset.name not in finished], config, start)
    others = {run.subset.name for run in runs} - finished.keys()
    folder = OwnedFolder(output_dir, WRITER)
    check_outputs(data, config, others)
    remove_stale(output_dir)
    errors = {name: listed for name, listed in known_errors(output_dir).items() if name not in others}
    for run in runs:
        name = run.subset.name
        if name not in finished:
            record, clusters, rejected = run.make(encoder)
            errors[name] = rejected
            # The record is written last: it marks the subset as finished, and the errors must be written before that.
            write_known_errors(folder, errors)
            write_sampling(output_dir, record, clusters)
        if config.file_format == "official":
            run.write_official()
    if others or not (output_dir / ERRORS).exists():
        write_known_errors(folder, errors)
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
    encoder: Encoder | None, runs: Sequence[SubsetRun], config: SampleConfig, start: float
) -> SampleResult:
    """Do the work of every process but the first: encode a share; the result that is returned is empty."""
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


def text_table(result: SampleResult) -> str:
    """Return the run's counts as a table for the terminal.

    Args:
        result: The result of the run.

    Returns:
        One line per subset, and a line with the totals if there are several. Where a search was approximate, a column
        says which share of the nearest candidates it found.
    """
    columns = ("rows", "queries", "candidates", "phase_1", "phase_2", "short", "reused", "errors")
    rows = []
    for record in result.records:
        figures: list[float] = [record["counts"][name] for name in columns]
        rows.append((record["subset"], [*figures, record["seconds"]["encode"], record["seconds"]["mine"]]))
    if len(rows) > 1:
        rows.append(("total", [sum(column) for column in zip(*(figures for _, figures in rows), strict=True)]))
    header = ["subset", *(name.replace("_", " ") for name in columns), "encode s", "mine s"]
    table = [header, *([name, *map(_figure, figures)] for name, figures in rows)]
    searches = [record.get("search", {}) for record in result.records]
    if any(search.get("kind") == "ivf" for search in searches):
        recalls = [f"{one['recall']:.4f}" if one.get("kind") == "ivf" else "exact" for one in searches]
        recalls += ["–"] * (len(rows) - len(recalls))
        cells = ["recall of the search", *recalls]
        table = [[*row, cell] for row, cell in zip(table, cells, strict=True)]
    return as_text(table)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"
