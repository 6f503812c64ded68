"""Evaluation on SugarCrepe and SugarCrepe++: which of several captions fits an image."""
