"""Inner products of unit vectors, in two kinds: approximate with a proven bound, and canonical.

A matrix product in float32 depends, in its last bits, on the library, the shapes and the threads. `sliced_product` is
within `error_bound` of the truth whatever they are. `canonical_scores` is the same float32 for the same two vectors,
whatever other vectors are scored in the same call. A decision that follows the first where it is clear, and the second
where it is not, is therefore always the same.

Cost: `sliced_product` is one float32 matrix product, m n d multiplications, and stores only its result. Canonical
scores are made pair by pair in float64, without a matrix product: they take several passes over the d products of each
pair and 8 d bytes or more per pair while they run. Hence they are computed for few pairs, and `pair_scores` takes 64 at
a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb.errors import Gen2EmbedError

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]
Vectors: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

TILE = 4096
SLICE = 384

_ULP = 2.0**-24
_FIXED_POINT = 2.0**50


def as_tensor(vectors: Vectors) -> torch.Tensor:
    """View vectors as a tensor, without a copy where NumPy's layout allows it.

    Args:
        vectors: An array or tensor of floating point numbers.

    Returns:
        The tensor, on the device it is on.
    """
    if isinstance(vectors, torch.Tensor):
        return vectors.detach()
    with warnings.catch_warnings():
        # Memory-mapped vectors are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.ascontiguousarray(vectors))


def check_unit_rows(vectors: Vectors, name: str) -> torch.Tensor:
    """Refuse what is not a matrix of unit vectors; this takes one pass over the vectors.

    Args:
        vectors: (n, d) Vectors in float16, bfloat16, float32 or float64.
        name: What to call them in an error.

    Returns:
        The vectors as a tensor.

    Raises:
        ValueError: They are not two-dimensional, empty or not floating point, or a row is not finite or not of length
            one (within 1e-2, for vectors that once were in half precision); the message names the first such row.
    """
    tensor = as_tensor(vectors)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise Gen2EmbedError(f"{name} has shape {tuple(tensor.shape)}; give one row a vector, (n, d) with n, d >= 1")
    if not tensor.is_floating_point():
        raise Gen2EmbedError(f"{name} holds {tensor.dtype}; give the float16, bfloat16 or float32 vectors themselves")
    for start in range(0, len(tensor), TILE):
        lengths = torch.linalg.vector_norm(tensor[start : start + TILE].float(), dim=1)
        wrong = ((lengths - 1).abs() <= 1e-2).logical_not().nonzero()
        if len(wrong):
            row = int(wrong[0])
            length = float(lengths[row])
            if not np.isfinite(length):
                fault = "holds NaN or an infinity; encode it again, or leave it out"
            elif length == 0:
                fault = "is all zeros; encode it again, or leave it out"
            else:
                fault = f"has length {length:.6g}, not 1; divide every row by its length first"
            raise Gen2EmbedError(f"{name}[{start + row}] {fault}")
    return tensor


def error_bound(terms: int) -> float:
    """Return how far a float32 inner product of unit vectors can be from the canonical one.

    Take a sum of products in which no product goes through more than n roundings, in whatever order, with or without
    fused multiply-add. It is within n u / (1 - n u) of the truth, times sum |a_i b_i| <= |a| |b| (Higham, Accuracy and
    Stability of Numerical Algorithms, 3.1), where u = 2^-24. The canonical score adds its own u; the lengths are one
    within 1e-2.

    Args:
        terms: n; the dimension, for any product of float32 vectors.

    Returns:
        The bound: 9.4e-5 for 1536 terms.
    """
    return 1.021 * (terms + 1) * _ULP / (1 - terms * _ULP)


def sliced_terms(dimensions: int) -> int:
    """Return the number of terms that `error_bound` takes for `sliced_product`."""
    return min(dimensions, SLICE) + -(-dimensions // SLICE)


def aligned(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Make an uninitialised float32 matrix whose rows begin on a cache line.

    A product that is written into another matrix takes up to a third longer.
    """
    return torch.empty((rows, -(-columns // 16) * 16), device=device)[:, :columns]


def sliced_product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply `left @ right.T`, a slice of the columns at a time.

    Slices are hardly slower: BLAS works in slices itself, but does not promise it. The bound on the error of a long sum
    is four times as tight, so fewer places are contested.

    Args:
        left: (m, d) float32.
        right: (n, d) float32.
        out: (m, n) A float32 matrix to write to, best one that `aligned` made.

    Returns:
        (m, n) float32.
    """
    out = aligned(len(left), len(right), left.device) if out is None else out
    scores = torch.mm(left[:, :SLICE], right[:, :SLICE].T, out=out)
    for start in range(SLICE, left.shape[1], SLICE):
        scores.addmm_(left[:, start : start + SLICE], right[:, start : start + SLICE].T)
    return scores


def canonical_scores(left: Floats, right: Floats) -> Floats:
    """Score pairs of unit vectors, reproducibly.

    The product of two float32 numbers is exact in float64. Each product is rounded to a multiple of 2^-50. The sum of
    these multiples is exact in float64 (it stays under 2^53 multiples), hence it is the same in every order; it is
    rounded to float32.

    Args:
        left: (..., d) float32, broadcast against `right`.
        right: (..., d) float32.

    Returns:
        (...) float32.
    """
    products = right.astype(np.float64)
    products *= left.astype(np.float64) * _FIXED_POINT
    np.rint(products, out=products)
    scores: Floats = (products.sum(-1) / _FIXED_POINT).astype(np.float32)
    return scores


def take(vectors: torch.Tensor, index: Integers, room: Floats | None = None) -> Floats:
    """Gather rows as float32 on the CPU.

    NumPy does it where it can, since a small call takes a fifth of the time that it takes in torch.

    Args:
        vectors: (n, d) Vectors.
        index: The rows, in any shape.
        room: A buffer that is written to where it is long enough; for an index of one dimension.

    Returns:
        (*index.shape, d) float32.
    """
    if vectors.device.type == "cpu" and vectors.dtype == torch.float32:
        if room is not None and len(index) <= len(room):
            # All rows exist; mode "clip" avoids the copy that NumPy makes to check them.
            return np.take(vectors.numpy(), index, axis=0, out=room[: len(index)], mode="clip")
        rows: Floats = vectors.numpy()[index]
        return rows
    return vectors[torch.from_numpy(index).to(vectors.device)].float().cpu().numpy()


def first_in_order(scores: Floats, index: Integers, count: int) -> Integers:
    """Order by score, the best first, equal scores by the smaller index.

    Args:
        scores: (n,) Canonical scores.
        index: (n,) The numbers that break ties.
        count: How many to return at most.

    Returns:
        Positions in `scores`.
    """
    return np.lexsort((index, -scores))[:count].astype(np.int64, copy=False)


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep matrix products in float32, whatever autocast or TF32 the caller has on: `error_bound` relies on it."""
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if (accelerator := torch.accelerator.current_accelerator()) is not None:
            stack.enter_context(torch.autocast(accelerator.type, enabled=False))
        try:
            for setting in settings:
                setting.fp32_precision = "ieee"
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value


def on_device(vectors: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move vectors to a GPU if twice their size is free there; otherwise they stay, and tiles are sent when needed.

    Args:
        vectors: (n, d) Vectors.
        device: The device on which they will be used.

    Returns:
        The vectors, on that device or where they were.
    """
    if device.type != "cuda" or vectors.device == device:
        return vectors
    free, _ = torch.cuda.mem_get_info(device)
    return vectors.to(device) if 2 * vectors.nelement() * vectors.element_size() < free else vectors


def contested_places(scores: Floats, k: int, error: float) -> tuple[int, int]:
    """Return which places of a list might, after canonical scoring, fall on the other side of the k-th place.

    Args:
        scores: Approximate scores, descending, more than k of them.
        k: The number of places before the cut.
        error: The bound on the error of the scores.

    Returns:
        (first, stop): Places before `first` are certainly among the first k, those from `stop` on certainly are not.
    """
    if scores[k - 1] - scores[k] > 2 * error:
        return k, k
    limit = float(scores[k - 1])
    ascending = -scores
    first = int(np.searchsorted(ascending, -(limit + 2 * error), "left"))
    stop = int(np.searchsorted(ascending, -(limit - 2 * error), "right"))
    return first, stop


def pair_scores(left: torch.Tensor, rows: Integers, right: torch.Tensor, columns: Integers) -> Floats:
    """Score pairs canonically, 64 at a time.

    Args:
        left: (n, d) Unit vectors.
        rows: (p,) Rows of `left`.
        right: (m, d) Unit vectors.
        columns: (p,) Rows of `right`.

    Returns:
        (p,) Canonical scores.
    """
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        scores[part] = canonical_scores(take(left, rows[part]), take(right, columns[part]))
    return scores
