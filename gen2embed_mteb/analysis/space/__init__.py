"""How queries and candidates lie in the space of vectors, as numbers and as a map (paper, Fig. 4)."""
