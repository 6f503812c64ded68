"""`gen2embed demo`: the main job on the embedded default, and its report."""
