"""Sampling offline: the command `gen2embed sample`, the files it writes, and the page that shows them."""
