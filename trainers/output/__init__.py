"""The output folder of a training run: what may be replaced in it, checkpoints, figures, and the model card."""
