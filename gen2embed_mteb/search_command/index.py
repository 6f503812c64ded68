"""An index on disk, searched exactly: every vector is compared with the query, block by block.

Memory holds one block of some thousand rows, the best rows so far, and for CSLS a sample of the index. The files are
those that the manifest names, in their order; equal scores are decided by the number of the row.

CSLS (see `evaluation.csls`) needs to know how near a row is to what is searched for in general. There is one query
here, so that a sample of the index itself takes the place of the queries: the score is transductive, and depends on
what else is in the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.encode_command.part_files import Block, count_rows, read_blocks, read_labels
from gen2embed_mteb.encode_command.report import read_manifest
from gen2embed_mteb.encode_command.vectors import restored, shortened
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.csls import csls, hubness, inner_products


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        row: Its number in the input.
        score: Its score.
        id: Its id.
        text: Its text, if the index holds texts.
        images: The paths of its images, if the index holds them.
    """

    row: int
    score: float
    id: str
    text: str = ""
    images: tuple[str, ...] = ()


class Index:
    """The output folder of `gen2embed encode`.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        manifest: The content of its manifest.

    Raises:
        Gen2EmbedError: The folder is unfinished, holds no vectors, or a file is missing or has other rows.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the manifest, and count the rows of every file by its header."""
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self._files: list[list[str]] = []
        for part in self.manifest["parts"]:
            names = list(part["files"])
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing or count_rows(self.folder, names) != part["rows"]:
                what = f"{missing[0]} is missing" if missing else f"{names[0]} has not {part['rows']} rows"
                raise Gen2EmbedError(f"{self.folder}: {what}; run gen2embed encode again")
            self._files.append(names)
        if not self._files:
            raise Gen2EmbedError(f"{self.folder}: holds no vectors, since every row was set aside")

    @property
    def num_vectors(self) -> int:
        """The number of vectors."""
        return int(self.manifest["vectors"]["count"])

    @property
    def dimensions(self) -> int:
        """The numbers per vector."""
        return int(self.manifest["vectors"]["dimensions"])

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Yield the vectors in order, with the number of the file that they are in."""
        for number, names in enumerate(self._files):
            for block in read_blocks(self.folder, names):
                yield number, block

    def search(
        self,
        query: npt.NDArray[np.float32],
        top: int = 10,
        *,
        csls_neighbors: int | None = None,
        csls_sample: int = 1000,
    ) -> list[Hit]:
        """Return the rows that are nearest to a query, best first.

        Args:
            query: (d,) float32 of length one; its first numbers are taken where the index holds fewer.
            top: How many rows.
            csls_neighbors: Score by CSLS, with the mean over this many rows of the sample; None: by the cosine.
            csls_sample: How many rows the sample has, at even distances.

        Raises:
            Gen2EmbedError: The query has fewer numbers than the vectors.
        """
        if len(query) < self.dimensions:
            raise Gen2EmbedError(f"the query has {len(query)} numbers, the index {self.dimensions}; use its own model")
        query = shortened(query[None], self.dimensions)[0]
        hubs = _Hubs(self, csls_sample, csls_neighbors) if csls_neighbors is not None else None
        best = np.zeros(0, np.dtype([("score", np.float64), ("row", np.int64), ("file", np.int64)]))
        done = 0
        for number, block in self.blocks():
            unit = restored(block.values)
            scores = inner_products(unit, query).astype(np.float64)
            if hubs is not None:
                scores = csls(scores.astype(np.float32), hubs.of(unit, done))
            done += len(unit)
            found = np.zeros(len(scores), best.dtype)
            found["score"], found["row"], found["file"] = scores, block.rows, number
            both = np.concatenate([best, found])
            best = both[np.lexsort((both["row"], -both["score"]))[:top]]
        return self._hits(best)

    def _hits(self, best: npt.NDArray[Any]) -> list[Hit]:
        labels: dict[int, dict[str, Any]] = {}
        for number in np.unique(best["file"]).tolist():
            wanted = set(best["row"][best["file"] == number].tolist())
            labels |= read_labels(self.folder, self._files[number], wanted)
        hits = []
        for score, row in zip(best["score"].tolist(), best["row"].tolist(), strict=True):
            told = labels[row]
            hits.append(Hit(row, score, told["id"], told.get("text") or "", tuple(told.get("images") or ())))
        return hits


class _Hubs:
    """How near rows are to a sample of the index: the mean cosine with the nearest rows of it, a row's own left out."""

    def __init__(self, index: Index, size: int, neighbors: int) -> None:
        count = index.num_vectors
        if count < 2:
            raise Gen2EmbedError("the index holds one vector, which csls cannot compare with others; leave it out")
        self._neighbors = neighbors
        self._places = np.unique(np.linspace(0, count - 1, min(size, count)).astype(np.int64))
        chosen, done = [], 0
        for _, block in index.blocks():
            inside = self._places[(self._places >= done) & (self._places < done + len(block.rows))]
            chosen.append(restored(block.values[inside - done]))
            done += len(block.rows)
        self._sample = np.concatenate(chosen)

    def of(self, unit: npt.NDArray[np.float32], first: int) -> npt.NDArray[np.float64]:
        """Return the number of each row of a block, whose first row is the `first` of the index."""
        found = hubness(unit, self._sample, self._neighbors)
        own = np.flatnonzero((self._places >= first) & (self._places < first + len(unit)))
        for number in own.tolist():
            place = int(self._places[number]) - first
            others = np.delete(self._sample, number, axis=0)
            found[place] = hubness(unit[place : place + 1], others, self._neighbors)[0]
        return found
