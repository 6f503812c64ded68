"""`gen2embed distill`: the language model learns which texts are alike from a text encoder (UniME, stage 1)."""
