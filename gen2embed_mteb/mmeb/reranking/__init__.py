"""Reranking in an evaluation: the best candidates of each row, scored by the generator of the same weights."""
