"""Samples hard negatives offline: the command `gen2embed sample`, the files it writes, and a page that shows them."""
