"""`gen2embed plan encode|evaluate|sample|numbers`: what a run will cost, before anything starts.

Rows are read, and the sizes of the pictures of some inputs. No weights are read or fetched, and no picture is decoded.
Inputs are distinct by text and name of pictures here; a run compares pictures by content, and may encode fewer.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.analysis.options import DataOptions
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import FlagParser, add_flags, from_flags
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.names import Side
from gen2embed_mteb.planning.costs import Hardware, Lengths, Load, Search, costs_of_config, report
from gen2embed_mteb.planning.options import NumbersOptions, PlanOptions, SideOption

ENCODE, EVALUATE, SAMPLE, NUMBERS = "encode", "evaluate", "sample", "numbers"
SUMMARIES = {
    ENCODE: "encoding a folder of pictures, or a table",
    EVALUATE: "encoding and scoring the datasets of MMEB or MMEB-mini",
    SAMPLE: "encoding training pairs, and mining them",
    NUMBERS: "so many inputs of such lengths, without any data",
}
SEED = 0


class Inputs(NamedTuple):
    """The distinct inputs of a run by side, its searches by name and sizes, and the source of its pictures.

    If `num_items` is given, the inputs are only some of so many.
    """

    sides: dict[Side, list[Item]]
    searches: list[tuple[str, int, int]]
    images: ImageSource
    num_items: int | None = None


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every kind of plan."""
    from gen2embed_mteb.encode_command.options import InputOptions
    from trainers.data.config import DataConfig

    kinds = parser.add_subparsers(dest="planned", required=True, metavar="run", parser_class=FlagParser)
    own: dict[str, tuple[Any, ...]] = {
        ENCODE: (InputOptions, ImageOptions, SideOption),
        EVALUATE: (DataOptions, ImageOptions),
        SAMPLE: (DataConfig, ImageOptions),
        NUMBERS: (NumbersOptions,),
    }
    for name, summary in SUMMARIES.items():
        added = kinds.add_parser(name, help=summary, description=summary)
        added.add_argument(
            "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what is done, and show tracebacks"
        )
        add_flags(added, PlanOptions)
        for options in own[name]:
            known = ("exif_orientation",) if options is ImageOptions and name == SAMPLE else ()
            add_flags(added, options, skip=known)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Print a plan.

    Args:
        arguments: The parsed flags.

    Returns:
        The exit status, 0.

    Raises:
        Gen2EmbedError: A setting, data or the model cannot be used.
    """
    options = from_flags(PlanOptions, arguments)
    hardware = Hardware(options.gpu, options.num_gpus, options.utilization, options.dtype)
    if arguments.planned == NUMBERS:
        text = _plan_numbers(options, from_flags(NumbersOptions, arguments), hardware)
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            read = {ENCODE: _encoding_inputs, EVALUATE: _evaluation_inputs, SAMPLE: _sampling_inputs}
            inputs = read[arguments.planned](arguments, Path(folder))
            text = _plan_inputs(options, inputs, hardware, arguments)
    sys.stdout.write(text + "\n")
    return 0


def _plan_numbers(options: PlanOptions, numbers: NumbersOptions, hardware: Hardware) -> str:
    from gen2embed_mteb.inspection.prompt_inspection import open_config

    name, config = open_config(options.model_name, revision=options.revision)
    model = costs_of_config(config)
    loads = [
        Load(label, count, (Lengths(tokens, (patches,) if patches else ()),), exact=True)
        for label, count, tokens, patches in (
            ("queries", numbers.num_queries, numbers.query_tokens, numbers.query_patches),
            ("candidates", numbers.num_candidates, numbers.candidate_tokens, numbers.candidate_patches),
        )
        if count
    ]
    if model.vision is None and (numbers.query_patches or numbers.candidate_patches):
        raise Gen2EmbedError(f"{name} takes text alone; leave --query_patches and --candidate_patches out")
    searches = []
    if numbers.search:
        searches = [Search("all", numbers.num_queries, numbers.num_candidates, options.pool_size)]
    return report(str(name), model, loads, searches, hardware)


def _plan_inputs(options: PlanOptions, inputs: Inputs, hardware: Hardware, arguments: argparse.Namespace) -> str:
    from gen2embed_mteb.inspection.prompt_inspection import open_prompt
    from gen2embed_mteb.planning.lengths import LengthCounter

    opened = open_prompt(options.model_name, prompt_mode=options.prompt_mode, revision=options.revision)
    model = costs_of_config(opened.config)
    if model.vision is None and any(item.images for items in inputs.sides.values() for item in items):
        raise Gen2EmbedError(f"{opened.name} takes text alone, and there are pictures in the data")
    counter, sizes = LengthCounter(opened, options.max_length), from_flags(ImageOptions, arguments)
    loads = []
    for side, items in inputs.sides.items():
        # The same inputs in every run; some of all datasets, since these differ.
        drawn = random.Random(SEED).sample(items, min(options.num_sampled, len(items)))  # noqa: S311
        lengths, image_bytes = _sampled(counter, side, drawn, inputs.images, sizes)
        if not lengths and items:
            raise Gen2EmbedError(f"none of {len(drawn)} inputs could be read; check --image_dir")
        count = len(items) if inputs.num_items is None else inputs.num_items
        loads.append(Load("queries" if side == "query" else "candidates", count, tuple(lengths), image_bytes))
    searches = [Search(label, queries, candidates, options.pool_size) for label, queries, candidates in inputs.searches]
    return report(str(opened.name), model, loads, searches, hardware)


def _sampled(
    counter: Any, side: Side, items: Sequence[Item], images: ImageSource, options: ImageOptions
) -> tuple[list[Lengths], float]:
    """Return the lengths of inputs, and the mean bytes of their pictures; those that cannot be read are left out."""
    lengths, total = [], 0
    for item in items:
        try:
            found = [fitted_size(images.facts(path).size, options, path) for path in item.images]
            total += sum(images.num_bytes(path) for path in item.images)
        except ImageError:
            continue
        lengths.append(counter.lengths(side, item.text, found))
    return lengths, total / max(1, len(lengths))


def _encoding_inputs(arguments: argparse.Namespace, folder: Path) -> Inputs:
    """Return some of the rows, evenly drawn while all are read once; rows that are equal are not found out."""
    from gen2embed_mteb.data_files.rows import BadRow
    from gen2embed_mteb.encode_command.opening import open_source
    from gen2embed_mteb.encode_command.options import ROWS_PER_SHARD, InputOptions
    from gen2embed_mteb.encode_command.row_images import RowImages

    options = from_flags(InputOptions, arguments)
    source = open_source(options)
    images = RowImages(source.image_root, folder, follow_links=options.follow_links)
    drawn: list[Any] = []
    count, dice = 0, random.Random(SEED)  # noqa: S311
    for part in source.parts(ROWS_PER_SHARD):
        for row in source.rows(part, options):
            if isinstance(row, BadRow):
                continue
            count += 1
            place = len(drawn) if len(drawn) < arguments.num_sampled else dice.randrange(count)
            if place < arguments.num_sampled:
                drawn[place : place + 1] = [row]
    kept: set[str] = set()
    items = [
        Item(row.text, tuple(images.keep(one, kept) if isinstance(one, bytes) else one for one in row.images))
        for row in drawn
    ]
    return Inputs({arguments.side: items}, [], images, count)


def _evaluation_inputs(arguments: argparse.Namespace, _folder: Path) -> Inputs:
    from gen2embed_mteb.analysis.inputs import candidate_side, open_data, rows_of
    from gen2embed_mteb.evaluation.run import RowError

    options = from_flags(DataOptions, arguments)
    data = open_data(options, exif_orientation=arguments.exif_orientation)
    sides: dict[Side, dict[Item, None]] = {"query": {}, "document": {}}
    for dataset, table in data.tables:
        for row in rows_of(dataset, table, options, options.limit):
            if not isinstance(row, RowError):
                sides["query"][row.query] = None
                sides[candidate_side(dataset)].update(dict.fromkeys(row.candidates))
    return Inputs({side: list(items) for side, items in sides.items()}, [], data.images)


def _sampling_inputs(arguments: argparse.Namespace, folder: Path) -> Inputs:
    from gen2embed_mteb.data_files.rows import BadRow
    from trainers.data.config import DataConfig
    from trainers.data.training_data import open_training_data

    data = open_training_data(from_flags(DataConfig, arguments), folder / "images")
    sides: dict[Side, list[Item]] = {"query": [], "document": []}
    searches = []
    for subset in data.subsets:  # each is encoded and mined on its own
        rows = [row for row in subset.rows() if not isinstance(row, BadRow)]
        queries, positives = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("query", "positive"))
        sides["query"] += queries
        sides["document"] += positives
        searches.append((subset.name, len(rows), len(positives)))
    return Inputs(sides, searches, data.images)
