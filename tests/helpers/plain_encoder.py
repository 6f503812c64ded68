"""A small real encoder for the evaluation's tests: hashed words plus a colour histogram, in numpy, deterministic.

Like a padded model it depends, in its last bits, on the batch that an input is encoded in: a run that resumes with
other batches gives other bytes, and tests that compare bytes notice.
"""

import hashlib
import time
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image

WORDS = 96
DIMENSIONS = WORDS + 64 + 1


def vector(text: str, images: list[Image.Image], jitter: float = 0.0) -> np.ndarray:
    """The unit vector of one input: hashed words, a 4x4x4 colour histogram, a constant; (DIMENSIONS,) float32."""
    out = np.zeros(DIMENSIONS)
    for word in text.lower().replace("<|image_1|>", " ").split():
        digest = hashlib.sha256(word.strip(".,:?!").encode()).digest()
        out[digest[0] % WORDS] += 1 if digest[1] % 2 else -1
    for image in images:
        pixels = np.asarray(image).reshape(-1, 3) // 64
        bins = np.bincount(pixels @ [16, 4, 1], minlength=64)
        out[WORDS : WORDS + 64] += bins / bins.sum()
    out[-1] = 0.05 + jitter
    return (out / np.linalg.norm(out)).astype(np.float32)


class PlainEncoder:
    """Encodes on both sides alike and keeps count of what it was given."""

    def __init__(self, delay: float = 0.0, text_alone: str = "") -> None:
        self.delay, self.text_alone = delay, text_alone
        self.given: Counter[tuple[str, str, tuple[tuple[int, int], ...]]] = Counter()

    def encode_query(self, inputs: list[dict[str, Any]], /) -> np.ndarray:
        return self._encode("query", inputs)

    def encode_document(self, inputs: list[dict[str, Any]], /) -> np.ndarray:
        return self._encode("document", inputs)

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        time.sleep(self.delay)
        longest = max(len(entry.get("text", "")) for entry in inputs)
        rows = []
        for entry in inputs:
            images = entry.get("image", [])
            images = images if isinstance(images, list) else [images]
            self.given[side, entry.get("text", ""), tuple(image.size for image in images)] += 1
            rows.append(vector(entry.get("text", ""), images, jitter=1e-6 * (longest + len(inputs))))
        return np.stack(rows)
