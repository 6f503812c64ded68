"""Comparing vectors of another program with those of the local model, kind by kind of input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.evaluation.tables import Table
from gen2embed_mteb.names import Side
from gen2embed_mteb.serving.samples import SIDES

PRECISIONS = ("float32", "bfloat16", "float16")
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999}
"""The least cosine that counts as the same vector, by the type of the other program's weights."""
MOST_NORM_ERROR = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 1e-2}
"""The largest relative difference of the norms; bfloat16 unit vectors are off by 4e-3."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """What came of one input on one side.

    Attributes:
        kind: What the input consists of.
        side: Its side.
        cosine: The cosine of the two vectors; `None` if there is none.
        norm_error: How far the norm is from that of the local vector, relative to it.
        fault: Why there is no cosine.
    """

    kind: str
    side: Side
    cosine: float | None = None
    norm_error: float = 0.0
    fault: str = ""


def compare(kind: str, side: Side, local: Any, other: Any) -> Compared:
    """Compare two vectors.

    Args:
        kind: What the input consists of.
        side: Its side.
        local: The local model's vector, (d,).
        other: The other program's.
    """
    ours, theirs = np.asarray(local, np.float64), np.asarray(other, np.float64)
    if ours.shape != theirs.shape:
        return Compared(kind, side, fault=f"{theirs.size} dimensions instead of {ours.size}")
    if not np.isfinite(theirs).all():
        return Compared(kind, side, fault="the vector holds NaN or an infinity")
    norm = float(np.linalg.norm(theirs))
    if not norm:
        return Compared(kind, side, fault="the vector is zero")
    own = float(np.linalg.norm(ours))
    return Compared(kind, side, float(ours @ theirs) / (own * norm), abs(norm - own) / own)


@dataclass(frozen=True)
class Report:
    """All comparisons with one program.

    Attributes:
        rows: One per input and side.
        precision: The type of the other program's weights.
        plain: The cosine of a text sent as plain `input`, with the local query and the local document; empty if it was
            not sent.
    """

    rows: Sequence[Compared]
    precision: str
    plain: Sequence[Compared] = ()

    @property
    def faults(self) -> list[str]:
        """What is wrong, one line each; empty if all vectors are the same."""
        least, most = LEAST_COSINE[self.precision], MOST_NORM_ERROR[self.precision]
        found = []
        for row in self.rows:
            where = f"{row.kind}, {row.side}"
            if row.cosine is None:
                found.append(f"{where}: {row.fault}")
            elif not row.cosine >= least:
                found.append(f"{where}: cosine {row.cosine:.6f}, below {least}")
            elif row.norm_error > most:
                found.append(f"{where}: the norm is off by {row.norm_error:.2g} (no normalisation, or another)")
        return list(dict.fromkeys(found))

    def worst(self, kind: str, side: Side) -> float | None:
        """Return the worst cosine of a kind on a side; `None` if an input of it has none."""
        cosines = [row.cosine for row in self.rows if (row.kind, row.side) == (kind, side)]
        return None if None in cosines or not cosines else min(one for one in cosines if one is not None)

    def table(self) -> Table:
        """Return the worst cosine per kind of input and side, with a header."""
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        return [["input", *SIDES]] + [[kind, *(_figure(self.worst(kind, side)) for side in SIDES)] for kind in kinds]

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        kinds = list(dict.fromkeys(row.kind for row in self.rows))
        return {
            "precision": self.precision,
            "worst_cosine": {kind: {side: self.worst(kind, side) for side in SIDES} for kind in kinds},
            "worst_norm_error": max((row.norm_error for row in self.rows), default=0.0),
            "plain_input": [asdict(row) for row in self.plain],
            "faults": self.faults,
        }


def hints(report: Report) -> list[str]:
    """Return what probably causes the faults, and the remedy; empty if there are none.

    Args:
        report: The comparisons with a server.
    """
    faulty = {line.partition(",")[0] for line in report.faults}
    if not faulty:
        return []
    with_image = {row.kind for row in report.rows if "image" in row.kind}
    if faulty <= with_image:
        return [
            "Texts are equal and images are not: the server did not hand the images to the chat template. Export the "
            "model again with this version, or start vLLM with --chat-template-content-format openai."
        ]
    return [
        "Check that the server was started on this very folder with --runner pooling --convert embed, without a chat "
        "template or a pooler of its own, and that --precision names the type of its weights."
    ]


def _figure(cosine: float | None) -> str:
    return "–" if cosine is None else f"{cosine:.6f}"
