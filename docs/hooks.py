"""What mkdocs runs while it builds the site: it writes the reference of all flags into `reference/flags.md`.

The flags are read where they are declared, so that none is written down twice:

- those of `evaluate`, `sample`, `inspect`, `export`, `demo` and `doctor` from the argument parser of the command line;
- those of `train` from its dataclasses, which are parsed and not imported, since importing them loads torch;
- those of `vlm2vec_adapter` from its dataclass, likewise.

Only the standard library and light modules of this project are imported: the site builds in seconds, without torch.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLACE = "<!-- flags -->"
TRAIN_CLASSES = ("TrainConfig", "Recipe", "SahaTrainingArguments")
"""The dataclasses of `train`: what to train on what, the recipe, and the training arguments with other defaults."""


class Flag(NamedTuple):
    """One line of the reference."""

    names: tuple[str, ...]
    default: str
    help: str


def parser() -> argparse.ArgumentParser:
    """Return the parser of `gen2embed`. The one place that knows where it comes from."""
    sys.path.insert(0, str(ROOT))
    try:
        from gen2embed_mteb.cli import _build_parser
    finally:
        sys.path.remove(str(ROOT))
    return _build_parser()


def commands() -> dict[str, tuple[str, list[Flag]]]:
    """Return, for each command, what it does and its flags."""
    choices = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = {
        f"gen2embed {name}": (command.description or "", list(_flags_of_parser(command)))
        for name, command in choices.choices.items()
    }
    _, given = found["gen2embed train"]
    found["gen2embed train"] = (found["gen2embed train"][0], given + list(_flags_of_dataclasses(TRAIN_CLASSES)))
    options = [
        flag._replace(
            names=tuple(name.replace("--", "--gen2embed_") for name in flag.names[:1]),
            default=flag.default.replace("required", ""),
        )
        for flag in _flags_of_dataclasses(("Options",), "vlm2vec_adapter")  # none is required
    ]
    found["python -m vlm2vec_adapter"] = ("run VLM2Vec's own eval.py with a Gen2Embed model", options)
    return found


def reference() -> str:
    """Return the reference of all flags as Markdown."""
    lines: list[str] = []
    for command, (summary, flags) in commands().items():
        lines += [f"## {command}", "", summary[:1].upper() + summary[1:].rstrip(".") + ".", ""]
        if command == "gen2embed train":
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


def _flags_of_parser(command: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = tuple(action.option_strings) or (action.dest,)
        text = action.help or ""
        if action.choices:
            text = f"{text}{'; ' if text else ''}one of {', '.join(map(str, action.choices))}"
        said = re.search(r"\(default: (.*)\)$", text)
        # Reading the default of the action itself is right for every kind of flag but the ones that only switch.
        default = "" if said or action.nargs == 0 else _shown(action.default)
        yield Flag(names, "required" if action.required and action.option_strings else default, text)


def _flags_of_dataclasses(names: tuple[str, ...], package: str = "") -> Iterator[Flag]:
    for name in names:
        for field in _class(name, package).body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
                flag = _flag(field.target.id, field.value)
                if flag is not None:
                    yield flag


def _class(name: str, package: str) -> ast.ClassDef:
    """Find a class by name, wherever its module was moved to."""
    for folder in (package,) if package else ("trainers", "gen2embed_mteb"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if re.search(rf"^class {name}\b", text, re.M):
                return next(n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    raise LookupError(f"no class {name} in the sources; adapt docs/hooks.py to where the flags are declared now")


def _flag(name: str, value: ast.expr) -> Flag | None:
    """Read `option("help", default=…, aliases=[…])` or `field(…, metadata={"help": …})`."""
    if not isinstance(value, ast.Call):
        return None
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    texts = [
        argument for argument in value.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]
    metadata = keywords.get("metadata")
    if not texts and isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        texts = [
            v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "help" and isinstance(v, ast.Constant)
        ]
    if not texts:
        return None
    defaults = [*value.args[1:2], *(keywords[key] for key in ("default",) if key in keywords)]
    default = ast.literal_eval(defaults[0]) if defaults and isinstance(defaults[0], ast.Constant) else ""
    if not defaults and "default_factory" not in keywords:
        default = "required"
    negated = (f"--no_{name}",) if default is True else ()
    aliases = ast.literal_eval(keywords["aliases"]) if "aliases" in keywords else []
    spelled = (alias for alias in aliases if "-" not in alias[2:])
    return Flag((f"--{name}", *spelled, *negated), _shown(default), str(texts[0].value))


def _shown(default: object) -> str:
    return "" if default in (None, "", argparse.SUPPRESS) or default == () or default is False else str(default)


def _cell(default: str) -> str:
    return f"`{default}`" if default and default != "required" else default


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("%%", "%").replace("<", "&lt;")
