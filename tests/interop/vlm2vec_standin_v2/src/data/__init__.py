"""Importing the package registers every dataset, those of video too."""

from src.data.eval_dataset import *  # noqa: F403
