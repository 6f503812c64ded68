"""`gen2embed serving-check URL DIR`: checks its flags, asks the server, prints the worst cosine per kind of input."""

from __future__ import annotations

import argparse
import os
import sys

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.tables import as_text
from gen2embed_mteb.flags import add_flags, from_flags
from gen2embed_mteb.serving.comparison import Report, hints
from gen2embed_mteb.serving.http_client import EmbeddingServer
from gen2embed_mteb.serving.options import ServingOptions


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_flags(parser, ServingOptions)


def run_command_with(arguments: argparse.Namespace) -> int:
    """Compare a server with the local model, and print the result.

    Args:
        arguments: The parsed flags.

    Returns:
        The exit status: 1 if a vector differs or is missing.

    Raises:
        Gen2EmbedError: The server cannot be reached, or the folder cannot be loaded.
    """
    options = from_flags(ServingOptions, arguments)
    key = ""
    if options.api_key_variable:
        key = os.environ.get(options.api_key_variable, "")
        if not key:
            raise Gen2EmbedError(f"the variable {options.api_key_variable} of --api_key_variable is not set, or empty")
    server = EmbeddingServer(options.url, timeout=options.timeout, key=key)
    name = options.served_model_name or server.model_name()  # before a model is loaded, which can take minutes
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.serving.check import check_server

    model = Gen2Embed(options.model, device=options.device, model_kwargs={"dtype": "float32"})
    report = check_server(server, model, served_name=name, precision=options.precision)
    sys.stdout.write(f"{text_of(report)}\n")
    return int(bool(report.faults))


def text_of(report: Report, other: str = "the server") -> str:
    """Return a report as text for a terminal.

    Args:
        report: The comparisons.
        other: What was compared with the local model.
    """
    lines = [f"The worst cosine of {other}'s vectors with the local model's:", "", as_text(report.table()), ""]
    if faults := report.faults:
        lines += [f"Failed: {len(faults)} comparisons", *(f"- {fault}" for fault in faults)]
        lines += hints(report) if report.plain else []
    else:
        lines.append(f"All vectors of {other} are those of the local model.")
    if report.plain:
        query, document = (
            f"refused ({row.fault})" if row.cosine is None else f"{row.cosine:.4f}" for row in report.plain
        )
        lines += [
            "",
            f'Warning: plain "input", as OpenAI clients send it, bypasses the prompt: its cosine with the query is '
            f'{query}, with the document {document}. Send "messages", with chat_template_kwargs.',
        ]
    return "\n".join(lines)
