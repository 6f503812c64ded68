"""Calibration: the map that is fitted on unlabelled inputs, and its use on stored vectors."""
