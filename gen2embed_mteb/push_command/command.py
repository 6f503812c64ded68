"""`gen2embed push`: checks its flags, says what will be sent, sends it, and says where it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.flags import add_flags, from_flags
from gen2embed_mteb.hub.plans import CARD, Plan
from gen2embed_mteb.push_command.options import PushOptions


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_flags(parser, PushOptions)


def run_command_with(arguments: argparse.Namespace) -> None:
    """Send a folder, or show what would be sent.

    Args:
        arguments: The parsed flags.

    Raises:
        Gen2EmbedError: The folder cannot be sent, or the hub refused it.
    """
    from gen2embed_mteb.hub.push import Target, push

    options = from_flags(PushOptions, arguments)
    plan = plan_of(options)
    if options.dry_run:
        kind = "data set" if plan.kind == "dataset" else plan.kind
        seen = "private" if options.private else "public"
        _say(
            f"{shown(plan)}\n\nNothing was sent; without --dry_run this goes to the {kind} {options.repo_id} ({seen})."
        )
        return
    for note in plan.notes:
        _say(f"note: {note}")
    names = ("repo_id", "revision", "private", "overwrite")
    done = push(plan, Target(**{name: getattr(options, name) for name in names}))
    sent = f"{len(done.sent)} files were sent, and read back" if done.sent else "all files were there; nothing was sent"
    _say(f"{done.url}: {sent}, commit {done.commit}")
    if plan.kind == "dataset":
        _say(f"Train on it with --processed_data_path hf://datasets/{options.repo_id}@{done.commit}")


def plan_of(options: PushOptions) -> Plan:
    """Return what is sent of a folder, whichever kind it is.

    Args:
        options: The flags.

    Raises:
        Gen2EmbedError: It cannot be sent.
    """
    from gen2embed_mteb.push_command.model_folder import model_plan
    from trainers.sampling.publishing import is_sampled, sampling_plan

    folder = Path(options.path).expanduser()
    if is_sampled(folder):
        if options.results:
            raise Gen2EmbedError("--results is for a model; leave it out for sampling files")
        return sampling_plan(folder, options.repo_id)
    return model_plan(folder, options.repo_id, options.results)


def shown(plan: Plan) -> str:
    """Return a plan as text: what is sent, what is left out and why, and the card.

    Args:
        plan: What is sent.
    """
    rows = [[file.name, f"{file.size:,}", file.sha256] for file in plan.files]
    total = sum(file.size for file in plan.files)
    parts = [as_text([["sent", "bytes", "SHA-256"], *rows, [f"{len(rows)} files", f"{total:,}", ""]])]
    if plan.left_out:
        width = max(len(one.name) for one in plan.left_out)
        parts.append("\n".join(["left out", *(f"  {one.name.ljust(width)}  {one.reason}" for one in plan.left_out)]))
    parts += [f"note: {note}" for note in plan.notes]
    if plan.card:
        parts.append(f"the card, {CARD}:\n\n{plan.card.rstrip()}")
    return "\n\n".join(parts)


def _say(text: str) -> None:
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
