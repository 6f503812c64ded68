"""The tables of `real_text.py`, from its JSON: for the terminal, and for the page of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gen2embed_mteb.evaluation.tables import Table, as_markdown, as_text, percent
from gen2embed_mteb.storage.developer_files import write_atomic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "training_free.md"
_END = "<!-- end of the table -->"
HALF = "reported"


def by_readout(record: Mapping[str, Any]) -> Table:
    """Return precision@1 on the reported half without a calibration: a row per prompt, a column per readout."""
    found = _figures(record)
    readouts = _unique(run["readout"] for run in record["runs"])
    prompts = _unique(run["prompt"] for run in record["runs"])
    return [["prompt", *readouts], *([name, *(found[name, one, "none"] for one in readouts)] for name in prompts)]


def by_calibration(record: Mapping[str, Any], readout: str) -> Table:
    """Return precision@1 on the reported half with a readout: a row per calibration, a column per prompt."""
    found = _figures(record)
    runs = [run for run in record["runs"] if run["readout"] == readout]
    prompts = _unique(run["prompt"] for run in runs)
    kinds = {run["calibration"]: run["transductive"] for run in runs}
    return [
        ["calibration", *prompts, "unlabelled inputs", "transductive"],
        *(
            [
                name,
                *(found[prompt, readout, name] for prompt in prompts),
                f"{record['inputs'][name]:,}",
                "yes" if transductive else "no",
            ]
            for name, transductive in kinds.items()
        ),
    ]


def by_claim(record: Mapping[str, Any]) -> Table:
    """Return what is claimed: a row per setting, with its gain over two others, each with an interval of 95 %."""
    bases = _unique(name for facts in record["claims"].values() for name in facts if name != HALF)
    rows = [[name, *(_spoken(facts.get(base)) for base in (HALF, *bases))] for name, facts in record["claims"].items()]
    return [["prompt, readout, calibration", "P@1", *bases], *rows]


def by_task(record: Mapping[str, Any], calibrations: Iterable[str]) -> Table:
    """Return precision@1 of every task with the last state: a row per task, a column per prompt and calibration."""
    runs = {(run["prompt"], run["readout"], run["calibration"]): run["tasks"] for run in record["runs"]}
    columns = [(prompt, one) for one in calibrations for prompt in ("none", "system", "hierarchical")]
    head = ["task", "half", *(f"{prompt}, {one}" if one != "none" else prompt for prompt, one in columns), "MiniLM"]
    trained = record["yardstick"]["tasks"]
    return [
        head,
        *(
            [
                task["name"],
                task["half"],
                *(percent(runs[prompt, "last", one][task["name"]]) for prompt, one in columns),
                percent(trained[task["name"]]),
            ]
            for task in record["tasks"]
        ),
    ]


def text(record: Mapping[str, Any]) -> str:
    """Return everything for a terminal."""
    number = sum(task["half"] == HALF for task in record["tasks"])
    parts = [(f"P@1, mean of {number} reported tasks, no calibration, by readout", by_readout(record))]
    parts += [
        (f"P@1, mean of {number} reported tasks, readout {one}, by calibration", by_calibration(record, one))
        for one in ("last", "pre-mlp")
    ]
    parts += [("P@1 on the reported tasks, and gains, each with an interval of 95 %", by_claim(record))]
    shown = "\n\n".join(f"{title}\n\n{as_text(table)}" for title, table in parts)
    return f"{shown}\n\nall-MiniLM-L6-v2, trained on pairs: {_spoken(record['yardstick'][HALF])}"


def page_tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the page in Markdown, by name."""
    name = record["model"]
    tables = {f"{name} readouts": by_readout(record), f"{name} claims": by_claim(record)}
    tables |= {f"{name} {one}": by_calibration(record, one) for one in ("last", "pre-mlp")}
    default = next(run["calibration"] for run in record["runs"] if run["calibration"].startswith("shared"))
    tables[f"{name} tasks"] = by_task(record, ("none", default))
    return {label: as_markdown(table) for label, table in tables.items()}


def write_page(record: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write the tables of a record into the page."""
    write_tables(page_tables(record), page)


def write_tables(tables: Mapping[str, str], page: Path = PAGE) -> None:
    """Write tables in Markdown into the places that a page has for them, by name."""
    text = page.read_text("utf-8")
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n\n")
        if mark:
            text = f"{before}{mark}{table}\n\n{_END}{rest.partition(_END)[2]}"
    write_atomic(page, text.encode())


def _figures(record: Mapping[str, Any]) -> dict[tuple[str, str, str], str]:
    return {(run["prompt"], run["readout"], run["calibration"]): percent(run[HALF][0]) for run in record["runs"]}


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _spoken(interval: list[float] | None) -> str:
    if interval is None:
        return "–"
    figure, low, high = map(percent, interval)
    return f"{figure} [{low}, {high}]"
