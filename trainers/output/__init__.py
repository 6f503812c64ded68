"""The folder of a training run: what may be replaced, checkpoints, figures, the model card."""
