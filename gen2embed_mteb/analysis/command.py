"""`gen2embed analyze attention|space|words`: checks its flags, loads the model, prints figures, writes files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.analysis.options import (
    PARQUET,
    PICTURES,
    AttentionOptions,
    OutputOptions,
    SpaceOptions,
    WordsOptions,
)
from gen2embed_mteb.config import ModelOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import FlagParser, add_flags, from_flags
from gen2embed_mteb.storage.owned_folder import OwnedFolder

if TYPE_CHECKING:
    from gen2embed_mteb.analysis.drawing.canvas import Canvas
    from gen2embed_mteb.embedder.model import Gen2Embed

WRITER = "analyze"
ATTENTION, SPACE, WORDS = "attention", "space", "words"


@dataclass(frozen=True)
class Analysis:
    """One of the analyses.

    Attributes:
        summary: What it shows.
        options: The dataclass of its own flags.
        skipped: Flags of the model that it has no use for.
        run: Runs it.
    """

    summary: str
    options: Any
    skipped: tuple[str, ...]
    run: Callable[[argparse.Namespace, ModelOptions, OutputOptions], int]


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every analysis."""
    kinds = parser.add_subparsers(dest="analysis", required=True, metavar="analysis", parser_class=FlagParser)
    for name, analysis in ANALYSES.items():
        added = kinds.add_parser(name, help=analysis.summary, description=analysis.summary)
        added.add_argument(
            "--verbose", action="store_true", default=argparse.SUPPRESS, help="log what is done, and show tracebacks"
        )
        add_flags(added, ModelOptions, skip=analysis.skipped)
        add_flags(added, analysis.options)
        add_flags(added, OutputOptions)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Run an analysis, print its figures and write its files.

    Args:
        arguments: The parsed flags.

    Returns:
        The exit status: 1 if more rows were set aside than `--max_error_rate` allows.

    Raises:
        Gen2EmbedError: A setting, data, the model or the folder cannot be used.
    """
    loading, output = from_flags(ModelOptions, arguments), from_flags(OutputOptions, arguments)
    if PARQUET in output.formats and arguments.analysis != SPACE:
        raise Gen2EmbedError(f"--format parquet is for analyze space; leave it out for analyze {arguments.analysis}")
    return ANALYSES[arguments.analysis].run(arguments, loading, output)


def _attention(arguments: argparse.Namespace, loading: ModelOptions, output: OutputOptions) -> int:
    from gen2embed_mteb.analysis.attention import run
    from gen2embed_mteb.analysis.attention.picture import picture

    options = from_flags(AttentionOptions, arguments)
    folder = _checked_folder(ATTENTION, loading, output)
    data = run.open_attention(options)
    result = replace(run.analyze_attention(_load(loading), options, data), model=loading.model_name)
    _say(run.text_table(result))
    _write(folder, ATTENTION, run.as_json(result), output, picture(result))
    _tell_errors(result.errors)
    return 0


def _space(arguments: argparse.Namespace, loading: ModelOptions, output: OutputOptions) -> int:
    from gen2embed_mteb.analysis.space import atlas, run
    from gen2embed_mteb.analysis.space.picture import picture
    from gen2embed_mteb.embedder.prompts.strategies import strategy

    options = from_flags(SpaceOptions, arguments)
    prompts = [strategy(name).name for name in options.prompts]
    data, rows = run.open_rows(options)
    tables = [atlas.file_of(one.dataset.name, prompt) for one in rows for prompt in prompts]
    folder = _checked_folder(SPACE, loading, output, tables if PARQUET in output.formats else ())
    model = _load(replace(loading, prompt_mode=prompts[0]), min_side=options.min_side)
    with folder.exclusive():
        result = run.analyze_space(model, options, folder.path / "embeddings", data, rows)
    result = replace(result, model=loading.model_name)
    _say(run.text_table(result))
    for panel in (panel for row in result.panels for panel in row if PARQUET in output.formats):
        written = folder.write(atlas.file_of(panel.dataset, panel.prompt), atlas.parquet_bytes(panel, data.images))
        _say(f"\nFor embedding-atlas: {written}")
    _write(folder, SPACE, run.as_json(result), output, picture(result) if options.projection != "none" else None)
    _tell_errors(result.errors)
    return int(result.error_rate > options.max_error_rate)


def _words(arguments: argparse.Namespace, loading: ModelOptions, output: OutputOptions) -> int:
    from gen2embed_mteb.analysis.words import run
    from gen2embed_mteb.analysis.words.picture import picture

    options = from_flags(WordsOptions, arguments)
    folder = _checked_folder(WORDS, loading, output)
    data = run.open_words(options)
    model = _load(replace(loading, prompt_mode=options.prompts[0]))
    result = replace(run.analyze_words(model, options, data), model=loading.model_name)
    _say(run.text_table(result))
    _write(folder, WORDS, run.as_json(result), output, picture(result))
    _tell_errors(result.errors)
    return 0


def _checked_folder(name: str, loading: ModelOptions, output: OutputOptions, more: Sequence[str] = ()) -> OwnedFolder:
    """Return the output folder; files of others are refused before a model is loaded."""
    folder = OwnedFolder(output.folder(loading.model_name), WRITER)
    folder.check([f"{name}.{kind}" for kind in ("json", *PICTURES)])
    folder.check(more)
    return folder


def _load(loading: ModelOptions, **options: Any) -> Gen2Embed:
    from gen2embed_mteb.embedder.model import Gen2Embed

    own: dict[str, Any] = {"layout": loading.layout, "pooling": loading.pooling}
    return Gen2Embed(loading.model_name, **own, **options, **loading.arguments())


def _write(folder: OwnedFolder, name: str, content: Any, output: OutputOptions, canvas: Canvas | None) -> None:
    written = [folder.write_json(f"{name}.json", content)]
    for kind in PICTURES:
        if canvas is not None and kind in output.formats:
            drawn = canvas.svg_bytes() if kind == "svg" else canvas.png_bytes()
            written.append(folder.write(f"{name}.{kind}", drawn))
        else:
            folder.remove(f"{name}.{kind}")  # of an earlier run, with other figures
    _say(f"\nWritten to {', '.join(map(str, written))}")


def _tell_errors(errors: Sequence[Any]) -> None:
    if errors:
        first = errors[0]
        _say(f"{len(errors)} rows were set aside; the first: {first.dataset} {first.row}, {first.reason}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


_OF_PROMPTS = ("prompt_mode", "pooling")
ANALYSES = {
    ATTENTION: Analysis(
        "how much attention the prompt, the image and the text receive, layer by layer",
        AttentionOptions,
        ("pooling", "readout", "readout_norm"),
        _attention,
    ),
    SPACE: Analysis(
        "how queries and candidates lie in the space of vectors, prompt by prompt: numbers and a map",
        SpaceOptions,
        _OF_PROMPTS,
        _space,
    ),
    WORDS: Analysis(
        "which tokens the output layer would write at the embedding's position",
        WordsOptions,
        (*_OF_PROMPTS, "readout", "readout_norm"),
        _words,
    ),
}
"""The analyses by name, in the order of the help."""
