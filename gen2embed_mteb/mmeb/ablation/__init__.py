"""The ablation: every prompt, readout, calibration and score of a model in one table, from one encoding."""
