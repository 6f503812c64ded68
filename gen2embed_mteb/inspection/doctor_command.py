"""`gen2embed doctor`: its flags and its exit status."""

from __future__ import annotations

import argparse
import sys

from gen2embed_mteb.config import DoctorOptions
from gen2embed_mteb.flags import add_flags, from_flags


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command to a parser."""
    add_flags(parser, DoctorOptions)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Print what was found, and return 0 if all is well, 1 for the installation, 2 for a model."""
    from gen2embed_mteb.inspection.doctor import diagnose, diagnose_model

    options = from_flags(DoctorOptions, arguments)
    if options.model is None:
        healthy, text = diagnose()
        sys.stdout.write(f"{text}\n")
        return 0 if healthy else 1
    healthy, text = diagnose_model(options.model, **options.arguments())
    sys.stdout.write(f"{text}\n")
    return 0 if healthy else 2
