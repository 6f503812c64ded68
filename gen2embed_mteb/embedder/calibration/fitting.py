"""Calibration: an affine map behind the model, fitted on unlabelled inputs, that spreads the vectors evenly.

The vectors of a generative model point into nearly the same direction, and queries into another one than candidates,
since only queries have the representation prompt. Here the mean is subtracted and the directions are evened out:

    x -> W (x - m) / |W (x - m)|,    W = C^(-1/2),    C = (1 - a) S + a tr(S) / d I

S is the covariance of the inputs' unit vectors, a the shrinkage: 1 subtracts the mean alone, 0 whitens fully. m is one
mean, or one per side; with one per side, S is the covariance within the sides. No label is used. This is ZCA whitening
(Bell and Sejnowski, 1997) with the covariance shrunk as by Ledoit and Wolf (2004). Subtracting a mean from embeddings
is from Mu and Viswanath (2018), whitening them from Su et al. (2021).

The order of the dimensions is the model's, or that of variance: W is then turned into the eigenvectors of S, the
largest variance first. This changes no cosine of whole vectors, and the first dimensions of a vector hold most of what
it says, so that it may be cut short.

The map is stock: sentence-transformers' `Dense` (in a `Router` for one mean per side) and `Normalize`. It is saved with
the model, and a folder with it loads with plain `SentenceTransformer`.

Cost: the fitting inputs are encoded once; sums of n, d and d x d float64 numbers per side (d = 1536: 19 MB), and one
eigendecomposition of d x d (d = 3584: about a minute on a CPU). Applying it is one product of d x d per vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side
from gen2embed_mteb.storage.atomic import json_bytes, write_in_scratch

if TYPE_CHECKING:
    from torch import nn

Means = Literal["shared", "side"]
Order = Literal["model", "variance"]

SHRINKAGE = 0.9
"""The default. Weaker shrinkage amplifies directions that are noise where few inputs were seen."""
LEAST_INPUTS = 100
"""Fewer inputs than this, both sides together, are refused: the mean of few inputs is mostly their content."""
RECORD_FILE = "calibration.json"
_NO_SPREAD = 1e-12
"""The variance below which unit vectors in float32 differ by rounding alone."""
_CHUNK = 1024
"""Inputs whose vectors are held at a time."""
_FULL_WIDTH = 10**9
"""A number of dimensions to truncate to that truncates nothing."""

_Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CalibrationRecord:
    """What a calibration was fitted on.

    Attributes:
        num_queries: The number of queries.
        num_documents: The number of candidates.
        shrinkage: a.
        means: "shared" or "side".
        data: What the inputs were, as the caller named it.
        order: "model" or "variance".
    """

    num_queries: int
    num_documents: int
    shrinkage: float
    means: Means
    data: str = ""
    order: Order = "model"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, or there are too few inputs.
        """
        check_settings(self.shrinkage, self.means, self.order)
        check_number_of_inputs(self.num_queries + self.num_documents)
        if min(self.num_queries, self.num_documents) == 0:
            raise Gen2EmbedError(
                f"calibration on {self.num_queries} queries and {self.num_documents} documents: a map that is fitted "
                "on one side does not fit the other; pass inputs of both"
            )

    def write(self, folder: Path) -> None:
        """Write it into the folder of a model that is being saved."""
        write_in_scratch(folder / RECORD_FILE, json_bytes(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> CalibrationRecord | None:
        """Read it from the folder of a model; `None` if there is none.

        Raises:
            Gen2EmbedError: The file is damaged.
        """
        path = folder / RECORD_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise Gen2EmbedError(
                f"{path} is no record of a calibration ({error}); calibrate the model again"
            ) from error


def check_number_of_inputs(number: int) -> None:
    """Check that there are enough inputs to fit on, both sides together.

    Raises:
        Gen2EmbedError: There are too few.
    """
    if number < LEAST_INPUTS:
        raise Gen2EmbedError(
            f"calibration on {number} inputs: their mean would be mostly their content; pass at least {LEAST_INPUTS}"
        )


def check_settings(shrinkage: float, means: str, order: str = "model") -> None:
    """Check the settings of a calibration.

    Raises:
        Gen2EmbedError: The shrinkage is not in (0, 1], or `means` or `order` is unknown.
    """
    if not 0 < shrinkage <= 1:
        raise Gen2EmbedError(f"shrinkage is {shrinkage}; pass a number above 0, up to 1 (1: subtract the mean alone)")
    if means not in get_args(Means):
        raise Gen2EmbedError(f"means is {means!r}; known: {', '.join(get_args(Means))}")
    if order not in get_args(Order):
        raise Gen2EmbedError(f"order is {order!r}; known: {', '.join(get_args(Order))}")


class Moments:
    """Sums over unit vectors, from which mean and covariance follow; sums of parts add up to those of the whole.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        """Start with no vector."""
        self.count = 0
        self.total: _Vector = np.zeros(width)
        self.products: _Vector = np.zeros((width, width))

    def add(self, vectors: npt.ArrayLike) -> None:
        """Add vectors.

        Args:
            vectors: (n, d) rows, in any floating type; they are brought to length 1.

        Raises:
            Gen2EmbedError: A row is not finite, or zero.
        """
        rows = np.asarray(vectors, dtype=np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not np.isfinite(lengths).all() or not lengths.all():
            raise Gen2EmbedError("a vector is not finite, or zero: check the model with gen2embed doctor MODEL")
        rows = rows / lengths
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows

    def merge(self, other: Moments) -> None:
        """Add the sums of another part, such as those of another process."""
        self.count += other.count
        self.total += other.total
        self.products += other.products

    @property
    def mean(self) -> _Vector:
        """(d,) float64."""
        return self.total / self.count

    @property
    def scatter(self) -> _Vector:
        """(d, d) float64: the sum of the products of what differs from the mean."""
        return self.products - np.outer(self.total, self.total) / self.count


@dataclass(frozen=True)
class Calibration:
    """A fitted map.

    Attributes:
        whitening: (d, d) float64, W.
        means: m for each side, (d,) float64; the same one for both if it is shared.
        record: What it was fitted on.
    """

    whitening: _Vector
    means: Mapping[Side, _Vector]
    record: CalibrationRecord

    def modules(self) -> list[nn.Module]:
        """Return the modules that compute the map, to be put behind the model's own."""
        import torch
        from sentence_transformers.base.modules import Router
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize

        def dense(mean: _Vector) -> nn.Module:
            width = len(mean)
            return Dense(
                width,
                width,
                activation_function=torch.nn.Identity(),
                init_weight=torch.tensor(self.whitening, dtype=torch.float32),
                init_bias=torch.tensor(-self.whitening @ mean, dtype=torch.float32),
            )

        if self.record.means == "shared":
            return [dense(self.means["query"]), Normalize()]
        routes = {side: [dense(self.means[side])] for side in ("query", "document")}
        return [Router(routes, default_route="document"), Normalize()]


def fit(
    queries: Moments,
    documents: Moments,
    *,
    shrinkage: float = SHRINKAGE,
    means: Means = "shared",
    data: str = "",
    order: Order = "model",
) -> Calibration:
    """Fit the map.

    Args:
        queries: The sums over the queries' vectors.
        documents: The sums over the candidates' vectors.
        shrinkage: a in (0, 1].
        means: "shared", one mean for both sides; "side", one for each.
        data: What the inputs were, for the record.
        order: The order of the dimensions, "model" or "variance".

    Raises:
        Gen2EmbedError: A setting is out of its range, or there are too few inputs.
    """
    record = CalibrationRecord(queries.count, documents.count, shrinkage, means, data, order)
    return Calibration(*solve(queries, documents, shrinkage=shrinkage, means=means, order=order), record)


def solve(
    queries: Moments, documents: Moments, *, shrinkage: float, means: Means, order: Order = "model"
) -> tuple[_Vector, dict[Side, _Vector]]:
    """Return W, and m for each side; the sums are not checked for their number.

    Args:
        queries: The sums over the queries' vectors.
        documents: The sums over the candidates' vectors; if either is empty, both sides have the other's mean.
        shrinkage: a in (0, 1].
        means: "shared" or "side".
        order: "model" or "variance".

    Returns:
        (d, d) float64, and per side (d,) float64.

    Raises:
        Gen2EmbedError: All vectors are equal.
    """
    spectrum = Spectrum.of(queries, documents, means)
    return spectrum.whitening(shrinkage, order), dict(spectrum.means)


@dataclass(frozen=True)
class Spectrum:
    """What maps of any shrinkage are made of: the means, and the covariance by its eigenvectors.

    Attributes:
        means: m for each side, (d,) float64.
        variances: (d,) float64, ascending: the eigenvalues of the covariance.
        directions: (d, d) float64, their unit eigenvectors as columns.
    """

    means: Mapping[Side, _Vector]
    variances: _Vector
    directions: _Vector

    @classmethod
    def of(cls, queries: Moments, documents: Moments, means: str) -> Spectrum:
        """Decompose sums, as `solve` does.

        Raises:
            Gen2EmbedError: All vectors are equal.
        """
        both = Moments(len(queries.total))
        both.merge(queries)
        both.merge(documents)
        if means == "shared" or not min(queries.count, documents.count):
            centres: dict[Side, _Vector] = {"query": both.mean, "document": both.mean}
            covariance = both.scatter / both.count
        else:
            centres = {"query": queries.mean, "document": documents.mean}
            covariance = (queries.scatter + documents.scatter) / both.count
        if float(np.trace(covariance)) < _NO_SPREAD:
            raise Gen2EmbedError("all vectors are equal: check the model with gen2embed doctor MODEL")
        values, directions = np.linalg.eigh(covariance)
        return cls(centres, np.maximum(values, 0.0), directions)

    def shrunk(self, shrinkage: float) -> _Vector:
        """Return the eigenvalues of the shrunk covariance, (d,) float64, all above 0.

        Args:
            shrinkage: a in (0, 1].
        """
        return np.asarray((1 - shrinkage) * self.variances + shrinkage * self.variances.mean())

    def whitening(self, shrinkage: float, order: Order = "model") -> _Vector:
        """Return W, (d, d) float64.

        Args:
            shrinkage: a in (0, 1].
            order: "model", C^(-1/2); "variance", its rows turned into the eigenvectors, the largest variance first.
        """
        evened = self.directions / np.sqrt(self.shrunk(shrinkage))
        if order == "model":
            return np.asarray(evened @ self.directions.T)
        # The sign of an eigenvector is free: its largest entry is made positive, so that all machines agree.
        largest = np.take_along_axis(evened, np.abs(evened).argmax(axis=0)[None], axis=0)
        return np.ascontiguousarray((evened * np.sign(largest)).T[::-1])


def calibrate(
    model: Any,
    queries: Sequence[Any],
    documents: Sequence[Any],
    *,
    shrinkage: float,
    means: Means,
    order: Order,
    data: str,
    options: dict[str, Any],
) -> CalibrationRecord:
    """Fit a map on inputs and put it behind a `Gen2Embed`, in place of an earlier one; see its method `calibrate`."""
    CalibrationRecord(len(queries), len(documents), shrinkage, means, data, order)  # checks, before hours of encoding
    if model.calibration is not None:
        detach(model)
    sums = [
        _moments(encode, inputs, options)
        for encode, inputs in ((model.encode_query, queries), (model.encode_document, documents))
    ]
    fitted = fit(*sums, shrinkage=shrinkage, means=means, data=data, order=order)
    attach(model, fitted)
    return fitted.record


def _moments(encode: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any]) -> Moments:
    sums: Moments | None = None
    for start in range(0, len(inputs), _CHUNK):
        vectors = encode(list(inputs[start : start + _CHUNK]), **{**options, "truncate_dim": _FULL_WIDTH})
        sums = sums or Moments(vectors.shape[1])
        sums.add(vectors)
    if sums is None:
        raise Gen2EmbedError("calibration needs inputs of both sides")
    return sums


def attach(model: Any, calibration: Calibration) -> None:
    """Put a map behind a model's modules, in place.

    Args:
        model: A `Gen2Embed`; its last module must be a `Normalize`.
        calibration: The map.
    """
    for module in calibration.modules():
        model.add_module(str(len(model)), module.to(model.device))
    model.calibration = calibration.record


def detach(model: Any) -> None:
    """Take the map away that `attach` put behind a model."""
    for _ in range(2):
        del model._modules[str(len(model) - 1)]
    model.calibration = None
