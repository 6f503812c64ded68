"""The command line: `python -m vlm2vec_adapter PATH/eval.py …`, `enable`, `disable`, `report`, `mini`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.storage.paths import expand_home
from vlm2vec_adapter.options import usage

USAGE = f"""\
python -m vlm2vec_adapter PATH/eval.py --model_backbone gen2embed <VLM2Vec's own flags>
python -m vlm2vec_adapter enable | disable      let plain `python eval.py --model_backbone gen2embed …` work, or not
python -m vlm2vec_adapter report OUT [OUT …]    the leaderboard's file, and tables beside the paper's figures
python -m vlm2vec_adapter mini DIR              draw MMEB-mini in the form that both generations read

Options beside VLM2Vec's, each also an environment variable (GEN2EMBED_PROMPT_MODE and so on):
{usage()}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or a script of VLM2Vec.

    Args:
        arguments: The words after `vlm2vec_adapter`; `None` takes them from the command line.

    Returns:
        The exit status: 0, or 2 for input that cannot be used.
    """
    words = expand_home(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    try:
        if not words[0].endswith(".py"):
            _command(words)
            return 0
        from vlm2vec_adapter.launch import prepare

        prepare(Path(words[0]), words[1:])
    except (Gen2EmbedError, OSError) as error:
        return _refuse(error)
    return _run(Path(words[0]))


def _run(script: Path) -> int:
    from vlm2vec_adapter.launch import run

    try:
        run(script)
    except Gen2EmbedError as error:  # ours; VLM2Vec's errors keep their tracebacks
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"vlm2vec_adapter: error: {one_line(error)}", file=sys.stderr)
    return 2


def _command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm2vec_adapter", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("enable", "disable"):
        commands.add_parser(name)
    commands.add_parser("mini").add_argument("folder", type=Path)
    report = commands.add_parser("report")
    report.add_argument("folders", type=Path, nargs="+", metavar="OUT")
    report.add_argument("--metadata", nargs="+", default=(), metavar="KEY=VALUE", help="for the leaderboard")
    asked = parser.parse_args(words)
    if asked.command == "report":
        from vlm2vec_adapter.results.report import write

        pairs = [item.partition("=") for item in asked.metadata]
        print(write(asked.folders, {key: value for key, _, value in pairs}))
    elif asked.command == "mini":
        from vlm2vec_adapter.mini import write as write_mini

        write_mini(asked.folder)
        print(f"Written to {asked.folder}")
    else:
        from vlm2vec_adapter import startup

        path = startup.enable() if asked.command == "enable" else startup.disable()
        print(f"{'Written' if asked.command == 'enable' else 'Deleted'}: {path}" if path else "It was not enabled.")


if __name__ == "__main__":
    sys.exit(main())
