"""Checks where a sampling run writes: never over its data, and never over a file that is not proved to be its own.

Three rules are checked before a model is loaded; `--overwrite` does not change them.

1. The output folder is not the folder of the training data: the next command would read the clusters as data.
2. Every file that is written is new, or is one that `gen2embed sample` wrote and nobody changed since
   (`gen2embed_mteb.storage.owned_folder`).
3. Every subset has a name that can be followed by `.parquet`, `.json` and `_hard_negatives.json`.

A folder that a version without digests of its files has written can be read, but nothing in it is replaced.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RowError
from gen2embed_mteb.storage.owned_folder import LEDGER, OwnedFolder
from trainers.data.training_data import SPLITS, MmebSubset, TrainingData
from trainers.sampling.config import SampleConfig
from trainers.sampling.files import WRITER, SamplingError, read_sampling, subset_files
from trainers.sampling.records import name_fault

ERRORS = "errors.jsonl"


def check_outputs(data: TrainingData, config: SampleConfig, to_make: Collection[str] | None = None) -> None:
    """Refuse an output folder in which a run would replace a file that is not its own; write nothing.

    Args:
        data: The opened training data.
        config: The run's settings.
        to_make: The names of the subsets that will be made; None: not known yet, so any subset may be.

    Raises:
        ForeignFileError: The run would replace a file that `gen2embed sample` did not write, or that was changed since.
        SamplingError: The files of a subset that will be made are of a version that kept no digests.
        ValueError: The folder is that of the data, a subset's name cannot be the name of a file, or a path is not
            UTF-8.
    """
    _check_names(data, config)
    _check_place(data, config)
    folder = OwnedFolder(config.folder, WRITER)
    inputs: list[str | Path] = [*_tables(data), config.data_dir, *([config.image_dir] if config.image_dir else [])]
    without_digests = not os.path.lexists(folder.path / LEDGER)
    undecided = False
    for subset in data.subsets:
        clusters, record, official = subset_files(subset.name)
        names = [clusters, record] if to_make is None or subset.name in to_make else []
        names += [official] if config.file_format == "official" else []
        if names and without_digests and _is_sampled(folder.path / record):
            if to_make is not None and record in names:
                raise SamplingError(
                    f"{folder.path / record}: sampled by a version that kept no digests of its files, so they are not "
                    f"replaced; pass another --output_dir, or move the files of {subset.name} away"
                )
            undecided = True
            continue
        folder.check(names, inputs)
    if not undecided and (to_make is None or to_make):
        folder.check([ERRORS], inputs)


def _check_names(data: TrainingData, config: SampleConfig) -> None:
    for subset in data.subsets:
        fault = name_fault(subset.name)
        if fault:
            raise Gen2EmbedError(
                f"{subset.source}: the subset's name {subset.name!a} {fault}; rename it, since its sampling files "
                "are called after it"
            )
    for text in (config.data_dir, config.image_dir, *config.columns, *(subset.source for subset in data.subsets)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Gen2EmbedError(f"{text!a} is not UTF-8, so no record can name it; rename it") from error


def _check_place(data: TrainingData, config: SampleConfig) -> None:
    folder, root = config.folder, Path(config.data_dir).expanduser()
    if os.path.lexists(folder) and not folder.is_dir():
        raise Gen2EmbedError(f"{folder} is no folder; pass another --output_dir")
    saved = root / data.split  # of `DatasetDict.save_to_disk`
    places = [root, *(path.parent for path in _tables(data)), *([saved] if (saved / "state.json").is_file() else [])]
    for place in dict.fromkeys(places):
        if place.is_dir() and _same(folder, place):
            raise Gen2EmbedError(
                f"{folder} is the folder of the training data, and clusters there would be read as data by the next "
                f"command; pass a folder of their own, such as --output_dir {folder / 'sampled'}"
            )
    if root.is_dir() and any(isinstance(subset, MmebSubset) for subset in data.subsets):
        for subset in data.subsets:
            path = folder / subset_files(subset.name)[0]
            if _is_of_split(path.resolve(), root.resolve(), {*SPLITS, data.split}):
                raise Gen2EmbedError(
                    f"{path} would be read as training data by the next command; pass another --output_dir"
                )


def _is_of_split(path: Path, root: Path, splits: Collection[str]) -> bool:
    """Say whether a file is where a split of MMEB-train's form is looked for; see `mmeb/tables.py`."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).parts
    for inside in (parts, parts[1:] if parts[0] == "data" else ()):
        if len(inside) == 2 and any(re.fullmatch(rf"{re.escape(split)}(-.*)?\.parquet", inside[1]) for split in splits):
            return True
        if len(inside) == 3 and inside[1] in splits:
            return True
    return False


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or (one.exists() and one.samefile(other))


def _tables(data: TrainingData) -> Iterator[Path]:
    """Yield the local files that hold the rows."""
    for subset in data.subsets:
        table = getattr(subset, "table", None)
        yield from getattr(table, "files", ())
        if path := getattr(table, "path", None):
            yield path


def _is_sampled(record: Path) -> bool:
    try:
        read_sampling(record)
    except SamplingError:
        return False
    return True


def write_known_errors(folder: OwnedFolder, errors: Mapping[str, list[RowError]]) -> None:
    """Write `errors.jsonl`: one line per row that was set aside, sorted by subset.

    Args:
        folder: The output folder.
        errors: The rows by subset; the file does not depend on the order in which subsets were made.
    """
    rows = (error._asdict() for name in sorted(errors) for error in errors[name])
    folder.write(ERRORS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def known_errors(output_dir: Path) -> dict[str, list[RowError]]:
    """Return the rows that earlier runs set aside, by subset.

    Args:
        output_dir: The output folder.

    Raises:
        SamplingError: The file is damaged.
    """
    path = output_dir / ERRORS
    known: dict[str, list[RowError]] = {}
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                rejected = RowError(**json.loads(line))
                if not all(isinstance(text, str) for text in (rejected.dataset, rejected.file, rejected.reason)):
                    raise Gen2EmbedError("dataset, file and reason must be texts")
                if type(rejected.row) is not int or rejected.row < 0:
                    raise Gen2EmbedError("row must be a whole number")
            except (ValueError, TypeError, RecursionError) as error:
                raise SamplingError(f"{path}, line {number}: damaged ({error}); move the file away") from error
            known.setdefault(rejected.dataset, []).append(rejected)
    return known
