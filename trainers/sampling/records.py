"""The record of a sampled subset, `<subset>.json`: every field is checked by type and range when it is read.

A record is a small JSON file that people copy and edit, and that can be cut off. Every field that `inspect`, `train`
and a later `sample` use is checked here, so that damage is reported in one line with file, field and remedy.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.errors import Gen2EmbedError

FORMAT = 1
ROW_LIMITS = tuple(RowLimits().row_limits())
METHODS = ("saha", "hn", "hn-beta", "in-batch")
MAX_HARD_NEGATIVES = 10_000
"""The largest k; it bounds a table of clusters, which has a row per cluster and a column per hard negative."""
MAX_RECORD_BYTES = 1 << 20
"""A record has about two kilobytes; a larger file than this is not a record, and is not read."""
MAX_ROWS = 1 << 40
OFFICIAL_SUFFIX = "_hard_negatives.json"
AGAIN = "run gen2embed sample again"
ANEW = f"move it away, then {AGAIN}"
"""For damaged files: they cannot be proved to be ours any more, so the user must move them."""

_MAX_SHOWN = 60


class SamplingError(Gen2EmbedError):
    """A sampling file that cannot be used; the message names the file, the fault and the remedy."""


class _Rule(NamedTuple):
    """A rule for a field: its meaning in words, and a function that says whether a value is allowed."""

    meaning: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int) -> _Rule:
    return _Rule(f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _or_null(rule: _Rule) -> _Rule:
    return _Rule(f"{rule.meaning}, or null", lambda value: value is None or rule.holds(value))


_TEXT = _Rule("a text", _is_text)
_FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
_COUNT = _whole(0, MAX_ROWS)
_SECONDS = _Rule("a number of seconds", lambda value: _is_number(value) and value >= 0)
_NAMES = _Rule(
    "a list of names", lambda value: isinstance(value, list) and len(value) < 3 and all(map(_is_text, value))
)

REQUIRED: Mapping[str, _Rule] = {
    "subset": _Rule("the name of a subset", lambda value: _is_text(value) and name_fault(value) is None),
    "method": _Rule(f"one of {', '.join(METHODS)}", lambda value: isinstance(value, str) and value in METHODS),
    "file": _Rule(
        "the name of a Parquet file beside the record",
        lambda value: _is_text(value) and value == Path(value).name and value.endswith(".parquet"),
    ),
    "sha256": _Rule(
        "64 hexadecimal digits", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
    ),
    "settings.num_hard_negatives": _whole(0, MAX_HARD_NEGATIVES),
    **{f"data.{name}": _TEXT for name in ("data_dir", "image_dir", "source", "split", "digest")},
    "data.columns": _NAMES,
    "data.image_columns": _NAMES,
    "data.limit": _or_null(_whole(1, MAX_ROWS)),
    "data.num_rows": _COUNT,
    **{f"model.{name}": _TEXT for name in ("name", "revision", "prompt_mode", "fingerprint")},
    **{
        f"counts.{name}": _COUNT
        for name in ("rows", "queries", "candidates", "errors", "clusters", "phase_1", "phase_2", "short", "reused")
    },
    "seconds.encode": _SECONDS,
    "seconds.mine": _SECONDS,
}
"""The fields that every record has."""

OPTIONAL: Mapping[str, _Rule] = {
    "settings.pool_multiplier": _or_null(_whole(1, MAX_ROWS)),
    "settings.variant": _or_null(_TEXT),
    "settings.labelled": _FLAG,
    "settings.beta": _or_null(_Rule("a number", _is_number)),
    "settings.resize": _TEXT,
    "settings.min_side": _COUNT,
    "settings.exif_orientation": _FLAG,
    "settings.search": _TEXT,
    "settings.search_threshold": _COUNT,
    "search.kind": _Rule("exact or ivf", lambda value: value in ("exact", "ivf")),
    "search.recall": _Rule("a share between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "search.recall_at": _COUNT,
    "search.recall_queries": _COUNT,
    "model.readout": _TEXT,
    "counts.collapsed": _COUNT,
    "data.pairs_only": _FLAG,
    "data.row_limits": _Rule(
        f"an object of whole numbers above 0 by {', '.join(ROW_LIMITS)}",
        lambda value: (
            isinstance(value, dict)
            and value.keys() <= set(ROW_LIMITS)
            and all(type(limit) is int and 1 <= limit <= MAX_ROWS for limit in value.values())
        ),
    ),
}
"""The fields that are checked if a record has them."""


def name_fault(subset: str) -> str | None:
    """Say why a subset cannot give its files their names; None if it can.

    Args:
        subset: The subset's name.

    Returns:
        The fault, worded so that it follows the name in a sentence.
    """
    if not subset:
        return "is empty"
    if not _is_text(subset) or any(character in subset for character in "/\\") or not subset.isprintable():
        return "holds a character that no file name should have"
    if os.name == "nt" and (set(subset) & set('<>:"|?*') or subset.endswith((".", " "))):
        return "holds a character that Windows accepts in no file name"
    if subset.startswith("."):
        return "begins with a dot: its files would be hidden"
    suffix = OFFICIAL_SUFFIX.removesuffix(".json")
    if subset.lower().endswith(suffix):
        return f"ends in {suffix}, which is kept for the official form of another subset"
    if len((subset + OFFICIAL_SUFFIX).encode()) > 255:
        return "is too long for the name of a file"
    return None


def require_record(record: Any) -> None:
    """Check every field of a record by type and range.

    Args:
        record: The content of a record's file, read or to be written.

    Raises:
        ValueError: It is not a record; the message names the first field that is wrong, its value and what it must be.
    """
    if not isinstance(record, dict):
        raise Gen2EmbedError(f"it is {_shown(record)}, not an object")
    for field, rule in REQUIRED.items():
        value, found = _look_up(record, field)
        if not found:
            raise Gen2EmbedError(f"{field} is missing, must be {rule.meaning}")
        _require(field, value, rule)
    for field, rule in OPTIONAL.items():
        value, found = _look_up(record, field)
        if found:
            _require(field, value, rule)
    least = 0 if record["method"] == "in-batch" else 1
    _require("settings.num_hard_negatives", record["settings"]["num_hard_negatives"], _whole(least, MAX_HARD_NEGATIVES))
    for name, value in record["counts"].items():
        _require(f"counts.{name}", value, _COUNT)


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Args:
        path: `<subset>.json`.

    Returns:
        The record's content: every field of `REQUIRED` is there and in its range.

    Raises:
        SamplingError: The record is missing or damaged, of an unknown format, or of an unknown method.
    """
    try:
        if not path.exists():
            raise SamplingError(f"{path}: not found; pass a file that gen2embed sample wrote, or {AGAIN}")
        if not path.is_file():
            raise SamplingError(f"{path}: no regular file; pass a file that gen2embed sample wrote")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise Gen2EmbedError(f"larger than {MAX_RECORD_BYTES:,} bytes")
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and type(record.get("format")) is int and record["format"] != FORMAT:
            raise SamplingError(
                f"{path}: format {record['format']}, this version reads {FORMAT}; update gen2embed, or {AGAIN}"
            )
        if not isinstance(record, dict) or record.get("format") != FORMAT or isinstance(record["format"], bool):
            raise Gen2EmbedError(f"its format is not {FORMAT}")
        require_record(record)
    except SamplingError:
        raise
    except RecursionError as error:
        raise SamplingError(f"{path}: no record of a sampling run (nested too deeply); {ANEW}") from error
    except (OSError, ValueError) as error:
        raise SamplingError(f"{path}: no record of a sampling run ({error}); {ANEW}") from error
    return dict(record)


def _look_up(record: dict[str, Any], field: str) -> tuple[Any, bool]:
    """Return a field's value, and whether the record has the field."""
    section, _, name = field.rpartition(".")
    if not section:
        return record.get(field), field in record
    inside = record.get(section)
    if section in record and not isinstance(inside, dict):
        raise Gen2EmbedError(f"{section} is {_shown(inside)}, must be an object")
    return (inside.get(name), name in inside) if inside is not None else (None, False)


def _require(field: str, value: Any, rule: _Rule) -> None:
    if not rule.holds(value):
        raise Gen2EmbedError(f"{field} is {_shown(value)}, must be {rule.meaning}")


def _shown(value: Any) -> str:
    """Return a value as JSON, cut if it is long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
