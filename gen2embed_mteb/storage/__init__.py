"""Writing files atomically, and replacing or deleting only files that are proved to be ours."""
