"""What mkdocs runs while it builds the site: it writes the reference of all flags into `reference/flags.md`.

The flags are those of the parsers themselves, which are made of dataclasses (`gen2embed_mteb.flags`), so that none is
written down twice. Of `train` and `distill`, only our own are listed: the libraries document theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- flags -->"
sys.path.insert(0, str(ROOT))


class Flag(NamedTuple):
    """One line of the reference."""

    names: tuple[str, ...]
    default: str
    help: str


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of every command, by what is typed."""
    from gen2embed_mteb.cli import COMMANDS, build_parser
    from gen2embed_mteb.flags import FlagParser, add_flags
    from trainers.config import TrainConfig
    from trainers.distillation.config import DistillArguments, DistillConfig
    from trainers.recipe import SahaTrainingArguments
    from vlm2vec_adapter.options import PREFIX, Options

    every = build_parser(*COMMANDS)
    choices = next(action for action in every._actions if isinstance(action, argparse._SubParsersAction))
    found = {f"gen2embed {name}": parser for name, parser in choices.choices.items()}
    kinds: dict[str, tuple[Any, Any]] = {
        "gen2embed train": (TrainConfig, SahaTrainingArguments),
        "gen2embed distill": (DistillConfig, DistillArguments),
    }
    for name, (config, arguments) in kinds.items():
        add_flags(found[name], config, valued_switches=True)
        every_field = {field.name for field in dataclasses.fields(arguments)}
        inherited = every_field - set(SahaTrainingArguments.__annotations__)
        add_flags(found[name], arguments, skip=sorted(inherited), valued_switches=True)
    found = dict(pair for name, parser in found.items() for pair in _each(name, parser))
    ours = FlagParser(description="run VLM2Vec's own eval.py with a Gen2Embed model")
    add_flags(ours, Options, valued_switches=True, prefix=PREFIX)
    return found | {"python -m vlm2vec_adapter": ours}


def commands() -> dict[str, tuple[str, list[Flag]]]:
    """Return, for each command, what it does and its flags."""
    return {name: (parser.description or "", list(_flags_of(parser))) for name, parser in parsers().items()}


def reference() -> str:
    """Return the reference of all flags as Markdown."""
    lines: list[str] = []
    for command, (summary, flags) in commands().items():
        lines += [f"## {command}", "", summary[:1].upper() + summary[1:].rstrip(".") + ".", ""]
        if command in ("gen2embed train", "gen2embed distill"):
            lines += [
                "These are the flags of this project. Every training argument of transformers and of "
                "sentence-transformers is a flag too; `gen2embed train --help` lists them all.",
                "",
            ]
        if command == "gen2embed mteb":
            lines += ["All words behind `mteb` go to mteb's own command line.", ""]
        lines += ["| flag | default | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| {', '.join(f'`{name}`' for name in flag.names)} | {_cell(flag.default)} | {_escaped(flag.help)} |"
            for flag in flags
        ]
        lines.append("")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where a page asks for it; what mkdocs calls for each page."""
    return markdown.replace(PLACE, reference()) if PLACE in markdown else markdown


def _each(name: str, parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    """Return the parser of a command, or those of its parts, by what is typed."""
    parts = next((action for action in parser._actions if isinstance(action, argparse._SubParsersAction)), None)
    return [(name, parser)] if parts is None else [(f"{name} {part}", one) for part, one in parts.choices.items()]


def _flags_of(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = tuple(action.option_strings) or (action.dest,)
        text, _, default = (action.help or "").removesuffix(")").partition(" (default: ")
        if action.required and action.option_strings:
            default = "required"
        yield Flag(names, default, text)


def _cell(default: str) -> str:
    return f"`{default}`" if re.fullmatch(r"[\w.+-]+", default) and default != "required" else _escaped(default)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%").replace("<", "&lt;")
