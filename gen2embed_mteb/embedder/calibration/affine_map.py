"""The map of a calibration, applied to vectors that were encoded without it, so that no input is encoded again.

A calibrated folder holds its map as the modules `Dense` (in a `Router` for one mean per side) and `Normalize` behind
the model. `read_calibrated` reads these alone, without the model's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.embedder.calibration.fitting import (
    RECORD_FILE,
    Calibration,
    CalibrationRecord,
    Means,
    Moments,
    check_number_of_inputs,
    solve,
)
from gen2embed_mteb.embedder.chat_formats.header import prompt_of
from gen2embed_mteb.embedder.model_folder import checks
from gen2embed_mteb.embedder.model_folder.settings import check_modules
from gen2embed_mteb.embedder.model_folder.weight_files import WEIGHTS_FILE
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.embedder.readouts.choice import Readout, stored_readout
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side

_CHUNK = 4096
"""Vectors that are in memory in float64 at a time."""


@dataclass(frozen=True)
class AffineMap:
    """x -> W x + b, brought to length 1.

    Attributes:
        weights: W per side, (d, d) float64.
        biases: b per side, (d,) float64.
    """

    weights: Mapping[Side, npt.NDArray[np.float64]]
    biases: Mapping[Side, npt.NDArray[np.float64]]

    @property
    def width(self) -> int:
        """The number d of dimensions."""
        return self.weights["query"].shape[1]

    @property
    def digest(self) -> str:
        """64 hexadecimal digits that are equal for equal maps."""
        digest = hashlib.sha256()
        for side in ("query", "document"):
            for part in (self.weights[side], self.biases[side]):
                digest.update(np.ascontiguousarray(part, dtype=np.float64).tobytes())
        return digest.hexdigest()

    @classmethod
    def fitted(cls, queries: Moments, documents: Moments, *, shrinkage: float, means: Means) -> AffineMap:
        """Fit a map on the inputs that it will be applied to, which may be all of one side.

        Args:
            queries: The sums over the queries' vectors.
            documents: The sums over the candidates' vectors.
            shrinkage: a in (0, 1]; see `calibration`.
            means: "shared" or "side".

        Raises:
            Gen2EmbedError: There are too few inputs, or all vectors are equal.
        """
        check_number_of_inputs(queries.count + documents.count)
        whitening, centres = solve(queries, documents, shrinkage=shrinkage, means=means)
        return cls(dict.fromkeys(centres, whitening), {side: -whitening @ mean for side, mean in centres.items()})

    @classmethod
    def of(cls, calibration: Calibration) -> AffineMap:
        """Return the map of a calibration, with its numbers as a calibrated folder has them, which is in float32."""

        def rounded(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return values.astype(np.float32).astype(np.float64)

        weights = rounded(calibration.whitening)
        biases = {side: rounded(-calibration.whitening @ mean) for side, mean in calibration.means.items()}
        return cls(dict.fromkeys(biases, weights), biases)

    def apply(self, side: Side, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map vectors; equal ones stay equal, to the last bit.

        Args:
            side: The side on which they were encoded.
            vectors: (n, d) float32, unit rows.

        Returns:
            (n, d) float32, unit rows; computed in float64.

        Raises:
            Gen2EmbedError: The vectors are of another width.
        """
        if not len(vectors):
            return vectors
        if vectors.shape[1] != self.width:
            raise Gen2EmbedError(
                f"the calibration maps vectors of {self.width} dimensions, the model's have {vectors.shape[1]}; "
                "calibrate this model: gen2embed calibrate"
            )
        out = np.empty(vectors.shape, np.float32)
        for start in range(0, len(vectors), _CHUNK):
            rows = vectors[start : start + _CHUNK].astype(np.float64) @ self.weights[side].T + self.biases[side]
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            out[start : start + _CHUNK] = rows / np.maximum(lengths, np.finfo(np.float64).tiny)
        # The last bits of a matrix product depend on a row's position; a tie would be decided by chance.
        first: dict[bytes, int] = {}
        for number, row in enumerate(vectors):
            place = first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), number)
            if place != number:
                out[number] = out[place]
        return out


@dataclass(frozen=True)
class CalibratedFolder:
    """What is read of a calibrated folder, without the model's weights.

    Attributes:
        folder: The folder.
        map: Its map.
        record: What the map was fitted on.
        prompt: The prompt of the vectors that it was fitted on; `None` if the folder names none.
        readout: Their readout.
    """

    folder: Path
    map: AffineMap
    record: CalibrationRecord
    prompt: HierarchicalPrompt | None
    readout: Readout


def read_calibrated(folder: str | Path) -> CalibratedFolder:
    """Read the map of a folder that `gen2embed calibrate` or `save_pretrained` wrote.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: There is no such folder.
        Gen2EmbedError: The folder has no calibration, or a file of it is damaged or refused.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"no such folder: {str(folder)!r} (given as calibration; pass own, or a folder that gen2embed calibrate "
            "wrote)"
        )
    record = CalibrationRecord.read(path)
    if record is None:
        raise Gen2EmbedError(
            f"{path} has no {RECORD_FILE}, so it is not calibrated; write one with gen2embed calibrate MODEL OUT, or "
            "pass own"
        )
    checks.check(checks.Source(str(path), path, None), with_weights=False)
    config = checks.read_settings(path / "config.json")
    template = path / "chat_template.jinja"
    return CalibratedFolder(
        folder=path,
        map=_read_map(path),
        record=record,
        prompt=prompt_of(template.read_text(encoding="utf-8")) if template.is_file() else None,
        readout=stored_readout(SimpleNamespace(**config), str(path)),
    )


def _read_map(path: Path) -> AffineMap:
    listed = path / checks.MODULES_FILE
    modules = check_modules(listed, json.loads(listed.read_text(encoding="utf-8"))) if listed.is_file() else []
    kinds = [kind for kind, _ in modules]
    if len(kinds) < 4 or kinds[-1] != "Normalize" or kinds[-2] not in ("Dense", "Router"):
        raise Gen2EmbedError(
            f"{path}: has a {RECORD_FILE}, but its modules are {', '.join(kinds) or 'none'}, which end in no "
            "calibration; calibrate the model again: gen2embed calibrate MODEL OUT"
        )
    kind, below = modules[-2]
    folders: dict[Side, Path] = {"query": path / below, "document": path / below}
    if kind == "Router":
        structure = checks.read_settings(path / below / "router_config.json").get("structure", {})
        routes = {side: structure.get(side) or [] for side in folders}
        if set(structure) != set(folders) or any(len(route) != 1 for route in routes.values()):
            raise Gen2EmbedError(
                f"{path / below}: its routes are not those of a calibration; calibrate the model again: gen2embed "
                "calibrate MODEL OUT"
            )
        folders = {side: path / below / routes[side][0] for side in folders}
    parts = {side: _read_dense(folder) for side, folder in folders.items()}
    return AffineMap({side: part[0] for side, part in parts.items()}, {side: part[1] for side, part in parts.items()})


def _read_dense(folder: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    found = {name: np.asarray(tensor.double().numpy()) for name, tensor in load_file(path).items()}
    nothing = np.zeros(0)
    weight, bias = found.get("linear.weight", nothing), found.get("linear.bias", nothing)
    if not weight.size or weight.shape != (len(bias), len(bias)):
        raise Gen2EmbedError(
            f"{path} is no map of a calibration (linear.weight, d x d, and linear.bias); calibrate the model again: "
            "gen2embed calibrate MODEL OUT"
        )
    return weight, bias
