"""`gen2embed search`: the rows of an index of `gen2embed encode` that are nearest to a query, by exact search."""
