"""`gen2embed encode`: checks its flags and its input, loads the model, encodes, prints a table."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import islice

from gen2embed_mteb.bulk.types import staged
from gen2embed_mteb.config import ModelOptions
from gen2embed_mteb.data_files.rows import BadRow
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.encode_command.opening import open_source
from gen2embed_mteb.encode_command.options import EncodeOptions
from gen2embed_mteb.encode_command.report import Outcome, write_reports
from gen2embed_mteb.encode_command.rows import Row
from gen2embed_mteb.encode_command.shard import EncodeJob
from gen2embed_mteb.encode_command.sources import ROWS_LOOKED_AT, Source
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import ROWS_SEARCHED, is_first_process, refuse_images
from gen2embed_mteb.evaluation.run_folder import UNKNOWN
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.flags import add_flags, from_flags
from gen2embed_mteb.launcher import end_with_launcher


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_flags(parser, ModelOptions)
    add_flags(parser, EncodeOptions)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Encode an input, and print what was written.

    Args:
        arguments: The parsed flags.

    Returns:
        The exit status: 1 if more rows were set aside than `--max_error_rate` allows.

    Raises:
        Gen2EmbedError: A setting, the input, the model or the folder cannot be used.
    """
    end_with_launcher()
    loading, options = from_flags(ModelOptions, arguments), from_flags(EncodeOptions, arguments)
    # Settings, input and output folder are checked before a model is loaded, which can take minutes.
    source = open_source(options)
    require_usable(source, options)
    EncodeJob(options, source, UNKNOWN).folder().check(overwrite=options.overwrite)
    from gen2embed_mteb.distributed.encoder import encoder_of_model
    from gen2embed_mteb.embedder.fingerprint import fingerprint
    from gen2embed_mteb.encode_command.driver import run_job
    from gen2embed_mteb.encode_command.model import described, load

    model = load(replace(loading, **options.loading({})), options.min_side)
    refuse_images(model.text_alone, {source.source: lambda: has_images(source, options)})
    width = model.get_embedding_dimension()
    if options.truncate_dim is not None and width is not None and options.truncate_dim > width:
        raise Gen2EmbedError(f"truncate_dim is {options.truncate_dim}, but vectors have {width} numbers; pass fewer")
    digest = fingerprint(model)
    with encoder_of_model(options, model, loading, digest) as encoder:
        suited = staged(encoder).batch_tokens
        job = EncodeJob(replace(options, batch_tokens=options.batch_tokens or suited), source, digest)
        job.folder().begin(overwrite=options.overwrite)
        run = run_job(encoder, job)
    if not is_first_process():
        return 0
    outcome = write_reports(job, run.num_parts, described(model, loading, options.side), run.checked)
    _say(text_table(outcome, run.num_encoded, run.num_rows, run.seconds))
    _say(f"\nWritten to {options.output_dir}")
    if outcome.verdict:
        _say(outcome.verdict)
    return int(outcome.too_many_errors)


def require_usable(source: Source, options: EncodeOptions) -> None:
    """Check that an input has a row that can be used, so that a wrong one is refused before hours of work.

    Args:
        source: The input.
        options: How large a row may be.

    Raises:
        DataError: There is none among the first `ROWS_LOOKED_AT`; the message says what is wrong with them.
    """
    first: BadRow | None = None
    count = 0
    for part in islice(source.parts(ROWS_SEARCHED), ROWS_LOOKED_AT // ROWS_SEARCHED):
        for row in source.rows(part, options):
            if isinstance(row, Row):
                return
            first, count = first or row, count + 1
    what = f"none of the first {count} rows can be used: {first.reason}" if first else "it has no rows"
    raise DataError(f"{source.source}: {what}")


def has_images(source: Source, options: EncodeOptions) -> bool:
    """Return whether one of the first rows has an image."""
    part = next(source.parts(ROWS_SEARCHED))
    return any(isinstance(row, Row) and row.images for row in source.rows(part, options))


def text_table(outcome: Outcome, num_encoded: int, num_rows: int, seconds: float) -> str:
    """Return what was written as a table for the terminal.

    Args:
        outcome: The finished folder.
        num_encoded: The number of inputs that this process passed to the model.
        num_rows: The number of rows that this process looked after.
        seconds: How long that took.
    """
    manifest = outcome.manifest
    model, vectors, settings = manifest["model"], manifest["vectors"], manifest["settings"]
    columns = ", ".join(f"{role}: {name}" for role, name in settings["columns"].items() if name)
    files = [name for part in manifest["parts"] for name in part["files"]]
    rate = num_rows / seconds if seconds else 0.0
    lines = [
        ["input", f"{settings['kind']}, {outcome.num_rows:,} rows" + (f" ({columns})" if columns else "")],
        ["model", f"{model['name']}, prompt {model['prompt_mode']}, side {manifest['side']}"],
        ["vectors", f"{vectors['count']:,} x {vectors['dimensions']} {vectors['precision']}"],
        ["set aside", f"{outcome.num_errors:,} rows"],
        ["files", f"{len(files):,}, {outcome.num_bytes / 1e6:,.1f} MB"],
        ["encoded now", f"{num_encoded:,} distinct inputs, {num_rows:,} rows in {seconds:,.1f} s ({rate:,.1f} rows/s)"],
    ]
    widest = max(len(text) for _, text in lines)
    return as_text([["encode", "".ljust(widest)], *([name, text.ljust(widest)] for name, text in lines)])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
