"""scikit-learn's real handwritten digits, as images of the mini world's size.

1,797 scans in the order they were written, by different people: the last 500 are for evaluation, the rest to learn
from.
"""

from __future__ import annotations

import numpy as np

from gen2embed_mteb.mini.world import digit_image

NUM_TEST = 500


def train_digits() -> tuple[np.ndarray, np.ndarray]:
    """(1297, 64, 64, 3) uint8 images and (1297,) int64 labels."""
    images, labels = _all_digits()
    return images[:-NUM_TEST], labels[:-NUM_TEST]


def test_digits() -> tuple[np.ndarray, np.ndarray]:
    """(500, 64, 64, 3) uint8 images and (500,) int64 labels."""
    images, labels = _all_digits()
    return images[-NUM_TEST:], labels[-NUM_TEST:]


def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    return np.stack([digit_image(scan) for scan in digits.images]), digits.target.astype(np.int64)
