"""The chat format of any model: how its own chat template is made to render the two-level prompt."""
