"""`gen2embed encode`: a folder of pictures or a table becomes files of vectors that vector stores read."""
