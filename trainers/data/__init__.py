"""Training pairs: which ones, from which tables, and what stands in a cell."""
