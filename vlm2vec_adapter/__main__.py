"""The command line: `python -m vlm2vec_adapter PATH/eval.py …`, `enable`, `disable`, `report`, `mini`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vlm2vec_adapter.options import usage

USAGE = f"""\
python -m vlm2vec_adapter PATH/eval.py --model_backbone gen2embed <VLM2Vec's own flags>
python -m vlm2vec_adapter enable | disable   let plain `python eval.py --model_backbone gen2embed …` work, or no longer
python -m vlm2vec_adapter report OUT …       the leaderboard's file, and tables beside the paper's figures
python -m vlm2vec_adapter mini DIR           draw MMEB-mini in the form that both generations read

Options beside VLM2Vec's, each also as an environment variable (GEN2EMBED_PROMPT_MODE and so on):
{usage()}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, or a script of VLM2Vec.

    Args:
        arguments: the words after `vlm2vec_adapter`; `None` takes them from the command line.

    Returns:
        The exit status: 0, or 2 for input that cannot be used.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if words else 2
    try:
        if words[0].endswith(".py"):
            from vlm2vec_adapter.launch import run

            run(Path(words[0]), words[1:])
            return 0
        if words[0] == "mini":
            from vlm2vec_adapter.mini import write

            write(Path(words[1]))
            return 0
        print(f"unknown command {words[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    except (ValueError, FileNotFoundError) as error:
        print(f"vlm2vec_adapter: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
