"""Flags that are defined by fields of dataclasses: one field defines the flag, its check and its help text.

1. `option` defines a field: its help text, its default, its accepted values, and the name of its flag.
2. `add_flags` adds the flags of a dataclass to a parser; `from_flags` builds the dataclass from the parsed arguments.
3. `check_options` checks the values of an instance; a dataclass calls it in `__post_init__`, so that a value is checked
   in the same way whether it comes from the command line or from Python.

`FlagParser` accepts `--data-dir` for `--data_dir`. transformers' `HfArgumentParser` reads the same fields, so that
`gen2embed train` can take them together with all training arguments of transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gen2embed_mteb.errors import Gen2EmbedError


def option(
    text: str,
    *,
    flag: str | None = "",
    aliases: Sequence[str] = (),
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    needs: str = "",
    opposite: str = "",
    positional: bool = False,
    **kwargs: Any,
) -> Any:
    """Define a field of a dataclass.

    Args:
        text: The help text.
        flag: The flag's name without dashes, if it differs from the field's; None if the field has no flag.
        aliases: Other names of the flag, without dashes.
        choices: The accepted values; empty if any value is accepted.
        least: The smallest accepted number.
        most: The largest accepted number.
        needs: The kind of value to pass, such as "a folder", if the value must not be empty.
        opposite: The name of a flag that sets a switch to False again, if there is one.
        positional: Whether the value is given without a flag.
        kwargs: Arguments of `dataclasses.field`: `default`, `default_factory`.
    """
    stated = {
        "choices": tuple(choices) or None,
        "least": least,
        "most": most,
        "needs": needs or None,
        "opposite": opposite or None,
        "positional": positional or None,
    }
    # Only keys with a value, since `HfArgumentParser` passes all of them to argparse.
    metadata: dict[str, Any] = {"help": text} | {name: value for name, value in stated.items() if value is not None}
    if flag != "":
        metadata["flag"] = flag
    if aliases:
        spellings = dict.fromkeys(spelt for name in aliases for spelt in (name, name.replace("_", "-")))
        metadata["aliases"] = [f"--{name}" for name in spellings]
    return dataclasses.field(metadata=metadata, **kwargs)


def check_options(config: Any, error: Callable[[str], Exception] = Gen2EmbedError, prefix: str = "") -> None:
    """Check every field of a dataclass against its `option`.

    Args:
        config: The instance.
        error: Makes an exception from a message.
        prefix: The text before the name of a field in messages, such as `--`.

    Raises:
        Gen2EmbedError: A value is not one of the choices, is out of its range, not finite or empty; the message names
            the field, the value and the remedy.
    """
    for field in dataclasses.fields(config):
        value, facts = getattr(config, field.name), field.metadata
        name = prefix + field.name
        if facts.get("needs") and not value:
            raise error(f"{name} is empty; pass {facts['needs']}")
        if facts.get("choices") and value is not None and value not in facts["choices"]:
            raise error(f"{name} is {value!r}; known: {', '.join(filter(None, facts['choices']))}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(name, value, facts.get("least"), facts.get("most"), error=error)


def check_number(
    name: str,
    value: float,
    least: float | None = None,
    most: float | None = None,
    *,
    error: Callable[[str], Exception] = Gen2EmbedError,
) -> None:
    """Check that a number is finite and in its range.

    Args:
        name: Its name in messages.
        value: The number.
        least: The smallest accepted number.
        most: The largest accepted number.
        error: Makes an exception from a message.

    Raises:
        Gen2EmbedError: It is not; the message names the value and the remedy.
    """
    if not math.isfinite(value):
        raise error(f"{name} is {value}; pass a finite number")
    if most is not None and value > most:
        raise error(f"{name} is {value}; pass {most:,} or {'fewer' if isinstance(value, int) else 'less'}")
    if least is not None and value < least:
        raise error(f"{name} is {value}; pass {least} or more")


class FlagParser(argparse.ArgumentParser):
    """A parser that accepts `--data-dir` for `--data_dir`, and refuses abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Replace dashes in flags by underscores, then parse as argparse does."""
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([underscored(word) for word in given], namespace)


def underscored(word: str) -> str:
    """Return a word of a command line with `_` instead of `-` in the flag's name; its value stays as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def add_flags(
    parser: argparse.ArgumentParser,
    kind: Any,
    *,
    defaults: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
    valued_switches: bool = False,
    prefix: str = "",
) -> None:
    """Add a flag for every field of a dataclass that has one.

    Args:
        parser: The parser that gets the flags.
        kind: The dataclass.
        defaults: Defaults that replace those of the fields, by name; a field named here is not required.
        skip: The names of fields that get no flag.
        valued_switches: Whether a switch may also take a value (`--dora false`), as in transformers.
        prefix: The beginning of the name of every flag.
    """
    defaults = defaults or {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.metadata.get("flag", "") is not None and field.name not in skip:
            _add_flag(
                parser,
                field,
                hints[field.name],
                defaults=defaults,
                valued_switches=valued_switches,
                prefix=prefix,
            )


def from_flags(kind: Any, parsed: argparse.Namespace, **more: Any) -> Any:
    """Build a dataclass from parsed arguments.

    Args:
        kind: The dataclass.
        parsed: The arguments from a parser to which `add_flags` added the flags of `kind`.
        more: Other values of fields; they take precedence.

    Returns:
        An instance, after its own checks.
    """
    values, hints = dict(more), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.init and field.name not in values and hasattr(parsed, field.name):
            value = getattr(parsed, field.name)
            is_tuple = get_origin(hints[field.name]) is tuple
            values[field.name] = tuple(value) if is_tuple else value
    return kind(**values)


def as_words(config: Any, *, skip: Sequence[str] = ()) -> list[str]:
    """Return the words of a command line that give a dataclass its values; defaults are left out.

    Args:
        config: An instance of a dataclass whose fields have flags.
        skip: The names of fields to leave out.
    """
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("flag", "") is None or field.name in skip or value == _default(field, {})[0]:
            continue
        flag = f"--{field.metadata.get('flag') or field.name}"
        listed = value if isinstance(value, tuple | list) else [] if value is True else [value]
        words += [flag, *map(str, listed)]
    return words


def _add_flag(
    parser: argparse.ArgumentParser,
    field: dataclasses.Field[Any],
    hint: Any,
    *,
    defaults: Mapping[str, Any],
    valued_switches: bool,
    prefix: str,
) -> None:
    facts = field.metadata
    default, required = _default(field, defaults)
    names = [f"--{prefix}{facts.get('flag') or field.name}", *facts.get("aliases", ())]
    if isinstance(parser, FlagParser):
        names = list(dict.fromkeys(map(underscored, names)))
    elif "_" in names[0]:
        names.insert(1, names[0].replace("_", "-"))
    text = facts["help"] + _ending(facts, default)
    kind, many = value_type(hint)
    if facts.get("positional"):
        optional: dict[str, Any] = {} if required else {"nargs": "?", "default": default}
        parser.add_argument(field.name, type=kind, help=text, **optional)
    elif kind is bool:
        group = parser.add_mutually_exclusive_group()
        switch: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
        if valued_switches or default is not False:
            group.add_argument(*names, nargs="?", const=True, type=switch_value, **switch)
        else:
            group.add_argument(*names, action="store_true", **switch)
        for opposite in (facts.get("opposite"), f"no_{field.name}" if default is True else ""):
            if opposite:
                spellings = [f"--{opposite}"]
                if not isinstance(parser, FlagParser):
                    spellings.append(f"--{opposite.replace('_', '-')}")
                group.add_argument(
                    *spellings,
                    dest=field.name,
                    default=default,
                    action="store_false",
                    help=f"the opposite of {names[0]}",
                )
    else:
        counts: dict[str, Any] = {"nargs": "+"} if many else {}
        parser.add_argument(*names, dest=field.name, type=kind, default=default, required=required, help=text, **counts)


def _default(field: dataclasses.Field[Any], defaults: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return a flag's default, and whether the flag is required."""
    if field.name in defaults:
        return defaults[field.name], False
    if field.default is not dataclasses.MISSING:
        return field.default, False
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory(), False
    return None, True


def _ending(facts: Mapping[str, Any], default: Any) -> str:
    """Return the end of a help text: the choices, and the default if the text does not state one."""
    ending = f": {', '.join(filter(None, facts['choices']))}" if facts.get("choices") else ""
    stated = "default:" in facts["help"] or (not default and default != 0) or default is False
    return ending if stated else f"{ending} (default: {default})"


def value_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of a flag's value, and whether the flag takes several.

    Args:
        hint: The type of the field: a plain one, one with None, a `Literal`, or a tuple or list.
    """
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) in (tuple, list):
        return get_args(hint)[0], True
    return (str if get_origin(hint) is Literal else hint), False


def switch_value(word: str) -> bool:
    """Return whether a word switches something on.

    Raises:
        argparse.ArgumentTypeError: It says neither.
    """
    if word.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if word.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
