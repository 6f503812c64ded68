"""`gen2embed demo`: the demo's flags, and its fine-tuning, which the demo itself cannot import."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from gen2embed_mteb.demo.config import DemoConfig
from gen2embed_mteb.flags import add_flags, from_flags


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_flags(parser, DemoConfig)


def run_command_with(arguments: argparse.Namespace) -> None:
    """Run the demo, and print its lines as they come.

    Args:
        arguments: The parsed flags.
    """
    from gen2embed_mteb.demo.run import run_demo

    config = from_flags(DemoConfig, arguments)
    places = (config.output_dir, config.data_dir, config.limit)
    step = None
    if config.max_steps:
        from trainers.demo import fine_tune

        step = partial(fine_tune, *places, config.max_steps)
    for line in run_demo(*places, fine_tune=step):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
