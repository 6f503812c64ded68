"""Training pairs: which ones are read, from which tables, and what a cell can hold."""
