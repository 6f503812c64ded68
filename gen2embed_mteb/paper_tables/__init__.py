"""The published tables as data, the check of their printed averages, and how a table is printed. See `published`."""
