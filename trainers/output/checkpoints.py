"""Checkpoints: each is there as a whole or not at all, and only our own are deleted.

1. A checkpoint is written under a temporary name, gets a ledger with the SHA-256 of every file, and is then renamed. A
   folder `checkpoint-N` without that ledger is not a checkpoint of ours; if a file differs from the ledger, the
   checkpoint is damaged.
2. Training goes on at the newest whole checkpoint. Its optimizer, scheduler and random states are pickles: they are
   read only if the ledger proves that they are what was written.
3. If there are too many checkpoints (`save_total_limit`), the oldest are deleted, and only if every file is ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import ForeignFileError, set_aside
from gen2embed_mteb.storage.new_folder import damage
from gen2embed_mteb.storage.owned_folder import OwnedFolder

logger = logging.getLogger(__name__)

WRITER = "train"
_NAME = re.compile(r"checkpoint-(\d+)")


def place_of(output_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of a step.

    Args:
        output_dir: The folder of the run.
        step: The number of optimizer steps done.
    """
    return Path(output_dir) / f"checkpoint-{step}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the run's own checkpoints, whole or damaged, the oldest step first.

    Args:
        output_dir: The folder of the run; it may be missing.
    """
    found = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if (match := _NAME.fullmatch(folder.name)) and OwnedFolder(folder, WRITER).known()
    ]
    return [folder for _, folder in sorted(found)]


def newest_whole(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that is as it was written, and warn of each newer one that is not.

    Args:
        output_dir: The folder of the run; it may be missing.

    Returns:
        The checkpoint's folder; None if there is none.
    """
    for folder in reversed(checkpoints(output_dir)):
        fault = damage(folder, WRITER)
        if fault is None:
            return folder
        logger.warning("%s is damaged (%s); training goes on at the checkpoint before it", folder, fault)
    return None


def require_whole(folder: str | Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Args:
        folder: The checkpoint.

    Raises:
        Gen2EmbedError: It is damaged, is not a checkpoint, or was not written by this trainer.
    """
    if fault := damage(Path(folder), WRITER):
        raise Gen2EmbedError(f"{folder} is no whole checkpoint: {fault}; pass another --resume_from_checkpoint")


def make_room(folder: Path) -> None:
    """Free the path of a checkpoint: delete an older checkpoint of ours there; rename it if it is damaged.

    Args:
        folder: The path of the new checkpoint.

    Raises:
        ForeignFileError: What is there is not ours.
    """
    if folder not in checkpoints(folder.parent):
        return  # there is nothing, or a foreign folder, which `new_folder` refuses
    try:
        OwnedFolder(folder.parent, WRITER).remove_tree(folder.name)
    except ForeignFileError as error:
        logger.warning("%s; it was renamed to %s", error, set_aside(folder).name)


def delete_oldest(output_dir: str | Path, limit: int | None, keep: Collection[str | Path] = ()) -> None:
    """Delete checkpoints, the oldest first, until no more than `limit` are left.

    Args:
        output_dir: The folder of the run.
        limit: How many may stay; None or 0: all. The newest and those of `keep` stay in any case.
        keep: Checkpoints that stay, such as the best one.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(output_dir)
    kept = {Path(folder).name for folder in (*keep, *found[-1:])}
    excess = len(found) - max(limit, len(kept))
    for folder in [folder for folder in found if folder.name not in kept][: max(excess, 0)]:
        try:
            OwnedFolder(output_dir, WRITER).remove_tree(folder.name)
        except ForeignFileError as error:
            logger.warning("%s (save_total_limit is %s)", error, limit)
