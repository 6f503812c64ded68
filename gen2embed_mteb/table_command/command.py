"""Runs what a table needs and is missing, then prints and writes the table.

1. The runs of the table are laid out (`plans`), and those that are finished are found by their records (`records`).
2. What is missing is said, and checked as far as files tell (`checks`).
3. Each missing run is made by the same command that a user would type, in this process. What it prints goes to a log.
4. The table is printed, and written as Markdown, LaTeX and JSON, with what our figures were measured on.

If it is killed at any moment and started again, it goes on in the run that was interrupted. If all runs are finished,
no model is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.config import EncodingConfig, LoadingOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import add_flags, as_words, from_flags
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.paper_tables.averages import deviations
from gen2embed_mteb.paper_tables.published import published
from gen2embed_mteb.paper_tables.rendering import as_latex, as_markdown, as_text
from gen2embed_mteb.paper_tables.view import OurFigures, view_of
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from gen2embed_mteb.table_command.captions import notes_of
from gen2embed_mteb.table_command.checks import check
from gen2embed_mteb.table_command.options import TableOptions
from gen2embed_mteb.table_command.plans import GOING_ON, Passed, Plan, Run
from gen2embed_mteb.table_command.records import figures_of, is_finished, parsed, results_of, set_aside

WRITER = "table"
_OWN_LOADING = ("prompt_mode", "revision", "readout", "readout_norm", "gguf_file", "adapter")
"""Options of loading that the table itself decides, or that cannot be the same for several models."""
_TRAIN_LOADING = ("dtype",)
_TRAIN_ENCODING = ("min_side", "exif_orientation")


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `gen2embed table`."""
    add_flags(parser, TableOptions)
    add_flags(parser, LoadingOptions, skip=_OWN_LOADING)
    add_flags(parser, EncodingConfig)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Run what is missing of a table, print the table and write it.

    Args:
        arguments: The parsed flags.

    Returns:
        The exit status: 1 if more rows of an evaluation were set aside than `--max_error_rate` allows.

    Raises:
        Gen2EmbedError: A setting, data, model or folder cannot be used, or a run failed.
    """
    options = from_flags(TableOptions, arguments)
    encoding = from_flags(EncodingConfig, arguments)
    if Share.from_environment().world_size > 1:
        raise Gen2EmbedError(
            "table runs in one process; to use several, run the commands that --dry_run lists with torchrun (each "
            "with --batch_size divided by their number in training), then table finds what is finished"
        )
    plan = Plan(options, passed_on(options, from_flags(LoadingOptions, arguments), encoding))
    folder = OwnedFolder(plan.output_dir, WRITER)
    files = {kind: f"table_{options.table}.{kind}" for kind in ("md", "tex", "json")}
    folder.check([*files.values(), *map(_log_name, plan.runs)])
    missing = _missing(plan)
    _say("\n".join(_announcement(plan, missing)))
    if options.dry_run:
        return 0
    with folder.exclusive():
        _run_all(missing, plan, folder)
    ours = [OurFigures(row.model, row.labels, figures_of(row), row.after) for row in plan.rows]
    view = view_of(published(options.table), ours, notes_of(plan))
    folder.write(files["md"], as_markdown(view).encode())
    folder.write(files["tex"], as_latex(view).encode())
    content = view.to_json() | {
        "deviations": [str(one) for one in deviations(view.table)],
        "runs": [_run_json(run) for run in plan.runs],
    }
    folder.write_json(files["json"], content)
    _say("\n" + as_text(view))
    _say(f"\nWritten to {', '.join(str(folder.path / name) for name in files.values())}")
    return int(any(_failed(run, encoding.max_error_rate) for run in plan.runs))


def _run_all(missing: list[Run], plan: Plan, folder: OwnedFolder) -> None:
    """Check all missing runs, then make them one after another."""
    if plan.options.mini and any(run.command == "sample" for run in missing):
        from gen2embed_mteb.mini.benchmark import ensure

        ensure("train", plan.options.data_dir or None)
    check(missing, [row.training.folder for row in plan.rows if row.training is not None])
    for number, run in enumerate(missing, start=1):
        _say(f"[{number}/{len(missing)}] {run.command}: {run.folder} …")
        start = time.monotonic()
        execute(run, folder)
        _say(f"    done in {time.monotonic() - start:.0f} s")


def execute(run: Run, folder: OwnedFolder) -> None:
    """Make a run by its command, in this process.

    Args:
        run: The run.
        folder: Where what it prints is kept, below `logs`.

    Raises:
        Gen2EmbedError: It ended without a finished record; errors of the command itself pass through.
    """
    from gen2embed_mteb.cli import COMMANDS

    arguments = parsed(run)
    if run.command == "train":
        given = arguments.rest if run.folder.is_dir() else _without(arguments.rest, GOING_ON)
        arguments.rest = [*given, *([] if sys.stderr.isatty() else ["--disable_tqdm", "true"])]
    status: int | None = None
    with _log(folder, run):
        status = COMMANDS[run.command].run(arguments)
    gc.collect()  # the model of this run, before the next one is loaded
    if run.command == "sample" and status:
        raise Gen2EmbedError(
            f"{run.folder}: more training pairs were set aside than --max_error_rate; see errors.jsonl"
        )
    if run.command != "sample" and not is_finished(run):
        raise Gen2EmbedError(f"gen2embed {run.command} has left no finished record in {run.folder}; run it again")


def passed_on(options: TableOptions, loading: LoadingOptions, encoding: EncodingConfig) -> Passed:
    """Return the words that every run of a table gets: how models are loaded, how inputs are encoded and opened.

    Args:
        options: What `table` is asked for.
        loading: How models are loaded.
        encoding: How inputs are encoded.
    """
    reached = [
        *as_words(LinkOption(follow_links=options.follow_links)),
        *as_words(RemoteOption(remote_images=options.remote_images)),
    ]
    own = [name for name in vars(loading) if name not in _TRAIN_LOADING]
    for_training = [] if loading.dtype == "auto" else as_words(loading, skip=own)
    unused = [name for name in vars(encoding) if name not in _TRAIN_ENCODING]
    on_cpu = ["--use_cpu", "true"] if (loading.device or "").startswith("cpu") else []
    return Passed(
        loading=tuple(as_words(loading)),
        encoding=(*as_words(encoding), *reached),
        training=(*for_training, *on_cpu, *as_words(encoding, skip=unused), *reached),
    )


def _missing(plan: Plan) -> list[Run]:
    """Return the runs that are not finished; a sampling is needed only for a training that is not."""
    finished = {run.folder: is_finished(run) for run in plan.runs if run.command != "sample"}
    for row in plan.rows:
        if row.sampling is not None and row.training is not None:
            done = finished[row.training.folder]
            finished[row.sampling.folder] = done and finished.get(row.sampling.folder, True)
            for run in row.evaluations:
                finished[run.folder] = finished[run.folder] and done
    return [run for run in plan.runs if not finished[run.folder]]


def _announcement(plan: Plan, missing: list[Run]) -> Iterator[str]:
    table, runs = plan.options.table, plan.runs
    counts = {command: sum(run.command == command for run in runs) for command in ("sample", "train", "evaluate")}
    kinds = ", ".join(f"{count} {command}" for command, count in counts.items() if count)
    if not missing:
        yield f"Table {table}: all {len(runs)} runs ({kinds}) are finished; nothing is run."
        return
    yield (
        f"Table {table} needs {len(runs)} run{'s' if len(runs) > 1 else ''} ({kinds}); "
        f"{len(runs) - len(missing)} finished, {len(missing)} to run:"
    )
    for run in missing:
        yield f"  gen2embed {shlex.join(run.words)}"


def _run_json(run: Run) -> dict[str, str]:
    known = {"folder": str(run.folder), "command": shlex.join(["gen2embed", *run.words])}
    return known | ({"fingerprint": results_of(run)["fingerprint"]} if run.command == "evaluate" else {})


def _failed(run: Run, max_error_rate: float) -> bool:
    if run.command != "evaluate":
        return False
    bad, rows = set_aside(results_of(run))
    return bad > max_error_rate * max(1, rows)


@contextlib.contextmanager
def _log(folder: OwnedFolder, run: Run) -> Iterator[None]:
    """Keep what a run prints in `logs`, below the folder of the tables; bars of progress still go to the terminal."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        folder.write(_log_name(run), printed.getvalue().encode("utf-8", "backslashreplace"))


def _log_name(run: Run) -> str:
    return f"logs/{run.folder.parent.name}/{run.folder.name}.log"


def _without(words: Sequence[str], flag: Sequence[str]) -> list[str]:
    """Return words without a flag and its value."""
    at = list(words).index(flag[0])
    return [*words[:at], *words[at + len(flag) :]]


def _say(text: Any) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
