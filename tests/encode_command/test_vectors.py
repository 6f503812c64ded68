"""Stored vectors: rounding against numpy's own and against exact fractions, truncation, and what depends on what."""

from fractions import Fraction

import numpy as np
import pytest

from gen2embed_mteb.encode_command.vectors import restored, rounded, shortened
from gen2embed_mteb.errors import Gen2EmbedError


@pytest.fixture
def unit() -> np.ndarray:
    random = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    return random / np.linalg.norm(random, axis=1, keepdims=True)


def test_float32_is_what_came_in(unit: np.ndarray) -> None:
    stored = rounded(unit, "float32")
    assert stored.scale is None
    assert stored.values.tobytes() == unit.tobytes()


def test_float16_is_the_nearest_half(unit: np.ndarray) -> None:
    stored = rounded(unit, "float16").values
    assert stored.dtype == np.float16
    for value, half in zip(unit[0].tolist(), stored[0], strict=True):
        neighbors = (np.nextafter(half, np.float16(-1)), np.nextafter(half, np.float16(1)))
        distance = abs(Fraction(value) - Fraction(float(half)))
        assert all(distance <= abs(Fraction(value) - Fraction(float(other))) for other in neighbors)


def test_int8_by_hand() -> None:
    vectors = np.array([[0.6, -0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    stored = rounded(vectors, "int8")
    assert stored.values.tolist() == [[95, -127, 0], [127, 0, 0], [0, 0, 0]]  # 0.6 / 0.8 x 127 = 95.25
    assert stored.scale is not None
    assert np.allclose(stored.scale, [0.8 / 127, 1 / 127, 0])


def test_int8_is_within_half_a_step_and_keeps_the_cosine(unit: np.ndarray) -> None:
    stored = rounded(unit, "int8")
    assert stored.values.dtype == np.int8
    assert stored.scale is not None
    back = stored.values.astype(np.float32) * stored.scale[:, None]
    assert (np.abs(back - unit) <= stored.scale[:, None] * 0.5001).all()
    cosines = (restored(stored.values) * unit).sum(axis=1)
    assert cosines.min() > 0.9999


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_row_depends_on_itself_alone(unit: np.ndarray, precision: str) -> None:
    together = rounded(shortened(unit, 40), precision)
    for number, row in enumerate(unit):
        alone = rounded(shortened(row[None], 40), precision)
        assert alone.values.tobytes() == together.values[number].tobytes()
        assert alone.scale is None or alone.scale[0] == together.scale[number]


def test_truncated_vectors_have_length_one_again(unit: np.ndarray) -> None:
    kept = shortened(unit, 24)
    exact = unit[:, :24].astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert kept.dtype == np.float32
    assert np.abs(kept - exact).max() < 1e-7
    assert shortened(unit, None) is unit
    assert shortened(np.zeros((1, 4), np.float32), 2).tolist() == [[0, 0]]
    with pytest.raises(Gen2EmbedError, match="truncate_dim is 97, but vectors have 96"):
        shortened(unit, 97)


def test_restored_rows_have_length_one(unit: np.ndarray) -> None:
    assert restored(unit) is unit
    for precision in ("float16", "int8"):
        assert np.abs(np.linalg.norm(restored(rounded(unit, precision).values), axis=1) - 1).max() < 1e-6
