"""Running VLM2Vec's own evaluation scripts, v1 and V2, with a Gen2Embed model as one of their backbones.

    python -m vlm2vec_adapter PATH/eval.py --model_backbone gen2embed <VLM2Vec's own flags>

No file of VLM2Vec is changed: the adapter imports its modules, adds entries to its registries and replaces a few
methods, all in memory, then runs the script.

1. `options.py` removes our own flags (`--gen2embed_*`) from the command line.
2. `launch.py` finds the generation of the script, and imports its modules; `scripts/stubs.py` replaces missing modules
   that are imported but never used here.
3. `scripts/session.py` replaces the methods that both generations share, which load the model, its configuration and
   its processor. `v1.py` and `v2.py` replace those that differ, which turn rows into inputs.
4. `scripts/engine.py` turns inputs into vectors, with `Gen2Embed` itself. `results/output.py` prevents two
   configurations from sharing an output folder, and `results/report.py` writes the leaderboard's file and tables.

This package imports `gen2embed_mteb`, never the reverse. Importing this package loads no other module, since
`startup.py`, if it is switched on, runs whenever a Python interpreter starts.
"""

BACKBONE = "gen2embed"
"""The name of this backbone in VLM2Vec: `--model_backbone gen2embed`."""

GENERATIONS = {"v2": "src/model/processor.py", "v1": "src/model_utils.py"}
"""VLM2Vec's generations, branch `main` and branch `v1`, each with a file beside `eval.py` that only it has."""
