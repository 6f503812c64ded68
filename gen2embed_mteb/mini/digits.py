"""scikit-learn's real handwritten digits, as images of the mini world's size.

There are 1,797 scans by different people, in the order in which they were written: the last 500 are for evaluation, the
others for training.
"""

from __future__ import annotations

import numpy as np

from gen2embed_mteb.mini.world import digit_image

NUM_TEST = 500


def train_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (1297, 64, 64, 3) uint8 images and (1297,) int64 labels."""
    images, labels = _all_digits()
    return images[:-NUM_TEST], labels[:-NUM_TEST]


def test_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (500, 64, 64, 3) uint8 images and (500,) int64 labels."""
    images, labels = _all_digits()
    return images[-NUM_TEST:], labels[-NUM_TEST:]


def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    return np.stack([digit_image(scan) for scan in digits.images]), digits.target.astype(np.int64)
