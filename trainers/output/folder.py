"""Checks a training run's output folder: what it may hold, whether the run is finished, and where it goes on.

A run's folder is new, empty, or one that an earlier run wrote and nobody changed since; it may also hold logs. A folder
with anything else (a model, sampling files, checkpoints of another program) is refused before data or model are loaded.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import ForeignFileError
from gen2embed_mteb.storage.new_folder import damage
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.batches.entries import EXPLICIT
from trainers.output.checkpoints import WRITER, checkpoints, newest_whole, require_whole
from trainers.recipe import SahaTrainingArguments

logger = logging.getLogger(__name__)

RUN_FILE = "train.json"
HARMLESS = ("*.log", "*.out", "*.err", "runs", "wandb", "emissions.csv", ".*")
"""Files that the folder may also hold: logs, files of TensorBoard, wandb and codecarbon, hidden files; all are kept."""
COMPARED = ("recipe", "arguments", "sampling")
"""Parts of `train.json` that must be equal for a run to go on."""
UNSAID = {"loss": "saha", "matryoshka_dims": [], "matryoshka_weights": [], "explicit_negatives": EXPLICIT}
"""What runs of earlier versions were trained with, whose records do not say it."""

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
"""Arguments whose product is the number of pairs per optimizer step."""
PRECISION = ("bf16", "fp16")


def check_output(output_dir: str | Path, inputs: Mapping[str, str | Path]) -> None:
    """Refuse a folder that holds a file which this command did not write.

    Args:
        output_dir: The folder that the run will write into; it may be missing.
        inputs: The places that the run reads, by the flag that names them; an empty one is ignored.

    Raises:
        ForeignFileError: The folder is one of the inputs, is not a folder, or holds a file of another program.
    """
    output = Path(output_dir)
    for flag, place in inputs.items():
        if str(place) and Path(place).expanduser().resolve() == output.resolve():
            raise ForeignFileError(f"output_dir {output} is the folder of --{flag}; choose another --output_dir")
    if output.exists() and not output.is_dir():
        raise ForeignFileError(f"output_dir {output} is a file; choose another --output_dir")
    folder = OwnedFolder(output, WRITER)
    known = set(folder.known())
    ours = {Path(name).parts[0] for name in known} | {place.name for place in checkpoints(output)}
    if RUN_FILE in known:
        ours.add("eval")  # the reports of evaluations during training, which have a record of their own
    for path in sorted(output.iterdir()) if output.is_dir() else ():
        if path.name in ours or any(fnmatch.fnmatch(path.name, pattern) for pattern in HARMLESS):
            continue
        if path.name.startswith("checkpoint-") and ".set-aside-" in path.name:
            continue  # set aside by an earlier run
        raise ForeignFileError.of(path, "was not written by gen2embed train")
    for name in sorted({name for name in known if "/" in name}):
        for path in (output / name).parent.iterdir() if (output / name).parent.is_dir() else ():
            if path.is_file() and path.relative_to(output).as_posix() not in known:
                raise ForeignFileError.of(path, "was not written by gen2embed train")


def agreed(args: SahaTrainingArguments, decide: Callable[[], Any]) -> Any:
    """Return what the first process decides, in every process; an error of the first is raised in all.

    Args:
        args: The training arguments, which say which process this is.
        decide: The function that decides; only the first process calls it.

    Raises:
        Gen2EmbedError: The first process raised it.
    """
    if args.world_size == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = decide()
        except (Gen2EmbedError, OSError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise Gen2EmbedError(outcome[1])
    return outcome[0]


def wants_to_resume(args: SahaTrainingArguments) -> bool:
    """Say whether `--resume_from_checkpoint` asks to continue an earlier run.

    Args:
        args: The training arguments.
    """
    return bool(args.resume_from_checkpoint) and str(args.resume_from_checkpoint).lower() not in ("false", "0", "no")


def finished(
    args: SahaTrainingArguments, record: Mapping[str, Any], *, elsewhere: bool = False
) -> dict[str, Any] | None:
    """Return the record of this run if it is finished and all files that it wrote are still there; None otherwise.

    Args:
        args: The training arguments; without `resume_from_checkpoint` nothing counts as finished.
        record: The record of what will be run.
        elsewhere: Whether it may have been run on another machine: by other numbers of processes and pairs per process
            that make the same step, or in another precision.

    Raises:
        Gen2EmbedError: The folder holds another run than this one.
    """
    folder = OwnedFolder(args.output_dir, WRITER)
    if not wants_to_resume(args) or not folder.owns(RUN_FILE):
        return None
    earlier = _earlier_record(folder.path / RUN_FILE)
    if "metrics" not in earlier:
        return None
    record = _as_run(record, earlier) if elsewhere else record
    _require_same(earlier, record, (checkpoints(folder.path) or [folder.path])[-1])
    # If the user has edited the card since, that is no reason to train again.
    missing = [name for name in folder.known() if name != "README.md" and not folder.owns(name)]
    if missing:
        logger.warning("%s: %s is missing or was changed since it was written", folder.path, missing[0])
        return None
    return earlier


def checkpoint_to_go_on(args: SahaTrainingArguments, record: Mapping[str, Any]) -> str | None:
    """Return the checkpoint to go on at, if the user wants that and it is of the same run; None to begin anew.

    Args:
        args: The training arguments.
        record: The record of what will be run.

    Raises:
        Gen2EmbedError: There are checkpoints and the flags do not say what to do with them, the one that was named is
            not whole, all of them are damaged, or they are of another run.
    """
    output_dir = Path(args.output_dir)
    found = checkpoints(output_dir)
    if not wants_to_resume(args):
        if found:
            raise Gen2EmbedError(
                f"{output_dir} holds {found[-1].name} of an earlier run; pass --resume_from_checkpoint true to go on "
                "there, or another --output_dir"
            )
        return None
    wanted = str(args.resume_from_checkpoint)
    checkpoint: Path | None
    if wanted.lower() not in ("true", "1", "yes"):
        checkpoint = Path(wanted)
        require_whole(checkpoint)
    else:
        checkpoint = newest_whole(output_dir)
    if checkpoint is None and found:
        raise Gen2EmbedError(
            f"no checkpoint in {output_dir} is whole ({found[-1].name}: {damage(found[-1], WRITER)}); pass another "
            "--output_dir to begin anew"
        )
    if checkpoint is None:
        logger.warning("%s holds no whole checkpoint: training begins anew", output_dir)
        return None
    _require_same(_earlier_record(checkpoint.parent / RUN_FILE), record, checkpoint)
    return str(checkpoint)


def _as_run(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record as if it were made where the earlier run was, if both have the same pairs per step."""
    now, then = record["arguments"], earlier.get("arguments", {})
    pairs = [math.prod(arguments.get(name, 0) for name in BATCH) for arguments in (now, then)]
    if pairs[0] != pairs[1]:
        return dict(record)
    return {**record, "arguments": now | {name: then[name] for name in (*BATCH, *PRECISION) if name in then}}


def _require_same(earlier: Mapping[str, Any], record: Mapping[str, Any], place: Path) -> None:
    for part in COMPARED:
        then, now = earlier.get(part, {}), json.loads(json.dumps(record[part]))
        then = {name: value for name, value in UNSAID.items() if name in now} | then
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise Gen2EmbedError(
                    f"{place} was trained with {name} {then.get(name)!r}, not {now.get(name)!r}; resume with the "
                    "same, or pass another --output_dir"
                )


def _earlier_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if not all(isinstance(record.get(part, {}), dict) for part in COMPARED):
            raise Gen2EmbedError("no record of a run")
        return dict(record)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Gen2EmbedError(
            f"{path}: cannot be read ({error}), so it is not known what the checkpoint is of"
        ) from error
