"""Where files are written: atomically, and replaced or deleted only if they are proved to be ours."""
