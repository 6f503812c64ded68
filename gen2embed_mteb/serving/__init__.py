"""Whether another program (a server, plain sentence-transformers) gives the vectors of the exported folder."""
