"""What a run writes and what is made of it: the output folder, files of vectors, the report."""
