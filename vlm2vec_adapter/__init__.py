"""VLM2Vec's own evaluation scripts, v1 and V2, with a Gen2Embed model as one of their backbones.

    python -m vlm2vec_adapter PATH/eval.py --model_backbone gen2embed <VLM2Vec's own flags>

No file of VLM2Vec is touched: the adapter imports its modules, adds entries to its registries and replaces a handful of
methods, all in memory, then runs the script.

1. `options.py` takes our own flags (`--gen2embed_*`) off the command line.
2. `launch.py` finds out which generation the script belongs to, and imports its modules; what is missing and never run
   on this path is stubbed (`stubs.py`).
3. `session.py` replaces what both generations share: how the model, its configuration and its processor are loaded.
   `v1.py` and `v2.py` replace what they do not: how rows become inputs.
4. `engine.py` turns inputs into vectors, with `Gen2Embed` itself. `output.py` keeps two configurations from sharing a
   folder, `report.py` makes the leaderboard's file and tables of it.

The dependency runs one way: this package imports `gen2embed_mteb`, never the reverse. Importing the package itself
loads nothing: where it was switched on, `startup.py` runs whenever an interpreter starts.
"""

BACKBONE = "gen2embed"
"""The name under which VLM2Vec knows us: `--model_backbone gen2embed`."""

GENERATIONS = {"v2": "src/model/processor.py", "v1": "src/model_utils.py"}
"""VLM2Vec's generations, each with a file that only it has, beside `eval.py`: branch `main`, and branch `v1`."""
