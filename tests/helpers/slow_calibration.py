"""The map of `--calibration own` once more, written down plainly, for tests."""

import numpy as np


def own_map(sides: dict[str, np.ndarray], shrinkage: float, means: str) -> dict[str, np.ndarray]:
    """Each distinct input's vector, mapped by the formula, in float64."""
    everything = np.concatenate(list(sides.values()))
    centres = {side: (rows if means == "side" else everything).mean(axis=0) for side, rows in sides.items()}
    centred = np.concatenate([rows - centres[side] for side, rows in sides.items()])
    covariance = centred.T @ centred / len(centred)
    width = len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / width * np.eye(width)
    values, directions = np.linalg.eigh(shrunk)
    whitening = directions @ np.diag(values**-0.5) @ directions.T
    mapped = {side: (rows - centres[side]) @ whitening for side, rows in sides.items()}
    return {side: rows / np.linalg.norm(rows, axis=1, keepdims=True) for side, rows in mapped.items()}
