"""The teacher's vectors of stage 1: from a file, or computed once by a `SentenceTransformer` and kept.

A file is one of two:

- `.npy`, an array of (texts, d) numbers: one vector for each text of the data, row after row, in a row of a pair the
  first text before the second; rows that cannot be used have theirs, too. Or (rows, width, d), which is the same. It
  is memory-mapped.
- `.parquet`, with a column `text` and a column `vector` (a list of numbers): the vectors are found by their text, so
  order and further rows do not matter. They are read into memory.

Vectors that a model computes are kept in a store (`gen2embed_mteb/bulk/store.py`): a run that was killed goes on, and
another run finds them. Norms do not matter: similarities are cosines.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import EmbeddingStore, StoreMismatchError
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.data_files.shards import require_regular
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.images.source import Images
from gen2embed_mteb.storage.atomic import sha256_of
from trainers.distillation.texts import Texts

FILES = (".npy", ".parquet")
TEXT_COLUMN, VECTOR_COLUMN = "text", "vector"
_ROWS = 8192


class TeacherVectors:
    """The teacher's vectors by the number of a distinct text.

    Args:
        vectors: (m, d) numbers; may be memory-mapped.
        places: (n,) int64, the row of `vectors` for each distinct text; None: text i has row i.
    """

    def __init__(self, vectors: npt.NDArray[Any], places: npt.NDArray[np.int64] | None = None) -> None:
        """Keep the arguments; nothing is read yet."""
        self._vectors, self._places = vectors, places

    def __len__(self) -> int:
        """Return the number of texts that have a vector."""
        return len(self._vectors if self._places is None else self._places)

    def __getitem__(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the vectors of n texts, (n, d) float32."""
        rows = numbers if self._places is None else self._places[numbers]
        return np.asarray(self._vectors[rows], dtype=np.float32)

    def check(self, texts: Texts, source: str) -> None:
        """Refuse vectors that have no direction; reads all of them once.

        Args:
            texts: The texts.
            source: The file or model, for the message.

        Raises:
            Gen2EmbedError: A vector is zero or not finite.
        """
        for start in range(0, len(self), _ROWS):
            found = self[np.arange(start, min(start + _ROWS, len(self)))]
            norms = np.linalg.norm(found.astype(np.float64), axis=1)
            bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
            if len(bad):
                text = texts.distinct[start + int(bad[0])]
                raise Gen2EmbedError(
                    f"{source}: the vector of the text {text[:60]!r} is zero or not finite; make it again with the "
                    "teacher"
                )


def vectors_in_file(path: str | Path, texts: Texts) -> TeacherVectors:
    """Open a file of the teacher's vectors; see this module's docstring for its form.

    Args:
        path: A `.npy` or `.parquet` file.
        texts: The texts.

    Raises:
        DataError: The path is not a regular file.
        FileNotFoundError: There is no such file.
        Gen2EmbedError: The file is of another kind, is damaged, or has not a usable vector for each text.
    """
    file = require_regular(Path(path).expanduser())
    if file.suffix not in FILES:
        raise Gen2EmbedError(f"{file}: teacher vectors are read from {' or '.join(FILES)}; convert the file")
    found = _from_npy(file, texts) if file.suffix == ".npy" else _from_parquet(file, texts)
    found.check(texts, str(file))
    return found


def _from_npy(file: Path, texts: Texts) -> TeacherVectors:
    try:
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Gen2EmbedError(f"{file}: no array ({one_line(error)}); write it with numpy.save") from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind != "f":
        raise Gen2EmbedError(f"{file}: holds {getattr(vectors, 'dtype', 'several arrays')}, not one array of floats")
    rows = texts.num_places // texts.width
    flat = (texts.num_places,) == vectors.shape[:-1]
    if vectors.ndim < 2 or not (flat or vectors.shape[:-1] == (rows, texts.width)):
        raise Gen2EmbedError(
            f"{file}: an array of {vectors.shape}, but the data has {rows:,} rows of {texts.width}: pass one of "
            f"({texts.num_places}, d), in the order of the texts"
        )
    return TeacherVectors(vectors.reshape(texts.num_places, vectors.shape[-1]), texts.places)


def _from_parquet(file: Path, texts: Texts) -> TeacherVectors:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, memory_map=True)
        names = table.schema_arrow.names
        if missing := {TEXT_COLUMN, VECTOR_COLUMN} - set(names):
            raise Gen2EmbedError(
                f"{file}: no column {' and '.join(sorted(missing))}; it has {', '.join(names)}. Name them "
                f"{TEXT_COLUMN} and {VECTOR_COLUMN}"
            )
        kind = table.schema_arrow.field(VECTOR_COLUMN).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (lists and pa.types.is_floating(kind.value_type)):
            raise Gen2EmbedError(f"{file}: column {VECTOR_COLUMN} holds {kind}; write lists of floating-point numbers")
        numbers = {text: number for number, text in enumerate(texts.distinct)}
        vectors: npt.NDArray[np.float32] | None = None
        known = np.zeros(len(numbers), dtype=np.bool_)
        for batch in table.iter_batches(_ROWS, columns=[TEXT_COLUMN, VECTOR_COLUMN]):
            for text, vector in zip(batch[TEXT_COLUMN].to_pylist(), batch[VECTOR_COLUMN], strict=True):
                number = numbers.get(text)
                if number is None or known[number] or vector.values is None:
                    continue
                row = np.asarray(vector.values.to_numpy(zero_copy_only=False), dtype=np.float32)
                if vectors is None:
                    vectors = np.zeros((len(numbers), len(row)), dtype=np.float32)
                if row.shape != vectors.shape[1:]:
                    raise Gen2EmbedError(
                        f"{file}: the vector of {text[:60]!r} has {row.shape} numbers, others {vectors.shape[1:]}"
                    )
                vectors[number], known[number] = row, True
    except (pa.ArrowException, TypeError, UnicodeDecodeError) as error:
        raise Gen2EmbedError(f"{file}: cannot be read ({one_line(error)}); write it again") from error
    if vectors is None or not known.all():
        first = texts.distinct[int(np.flatnonzero(~known)[0])]
        raise Gen2EmbedError(
            f"{file}: {int((~known).sum()):,} of {len(known):,} texts have no vector, the first {first[:60]!r}; add "
            "them"
        )
    return TeacherVectors(vectors)


class _Encoder:
    """A `SentenceTransformer` as bulk encoding takes it."""

    text_alone = "a teacher reads texts alone"

    def __init__(self, model: Any, prompt: str) -> None:
        self._model, self._prompt = model, prompt

    def encode_document(self, inputs: list[dict[str, Any]], /) -> Any:
        texts = [one["text"] for one in inputs]
        more: dict[str, Any] = {"prompt": self._prompt} if self._prompt else {}
        found = self._model.encode(
            texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False, **more
        )
        return np.asarray(found, dtype=np.float32)

    encode_query = encode_document


def vectors_of_model(
    name: str,
    texts: Texts,
    folder: str | Path,
    images: Images,
    *,
    prompt: str = "",
    device: Any = None,
    share: Share | None = None,
) -> TeacherVectors:
    """Compute the vectors of a `SentenceTransformer`, or find them in the folder.

    Args:
        name: Hub id, directory or short name.
        texts: The texts.
        folder: The store of the vectors; runs can share it.
        images: The data's images, of which the texts have none.
        prompt: What is put before each text.
        device: Where the teacher runs; None: where sentence-transformers puts it.
        share: The part of the work that belongs to this process.

    Raises:
        Gen2EmbedError: The teacher cannot be loaded or cannot encode a text.
        StoreMismatchError: The folder holds vectors of another teacher or prompt.
    """
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(resolve(name) or name, device=device, model_kwargs={"use_safetensors": True})
    except Gen2EmbedError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise Gen2EmbedError(
            f"teacher {name} cannot be loaded as a SentenceTransformer ({one_line(error)}); pass another, or its "
            "vectors with --teacher_vectors"
        ) from error
    try:
        store = EmbeddingStore(folder, {"teacher": _digest_of(model), "prompt": prompt})
    except StoreMismatchError as error:
        raise StoreMismatchError(f"{str(error).rpartition('; ')[0]}; pass another --teacher_dir") from error
    bulk = BulkEncoder(_Encoder(model.eval(), prompt), store, images, share=share)
    items = [Item(text) for text in texts.distinct]
    bulk.add("document", items, label="teacher")
    for item in items:
        if (fault := bulk.fault("document", item)) is not None:
            raise Gen2EmbedError(f"teacher {name} cannot encode {item.text[:60]!r}: {fault.reason}; leave that row out")
    found = TeacherVectors(bulk.vectors("document", items))
    found.check(texts, f"teacher {name}")
    return found


def _digest_of(model: Any) -> str:
    """Return a digest of a model's weights and of what else decides the vectors of texts."""
    import torch

    digest = hashlib.sha256(f"{model!r} {model.max_seq_length} {model.prompts} {model.default_prompt_name}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def identity_of_file(path: str | Path) -> str:
    """Return what tells a file of vectors from others, for the record of a run: its SHA-256."""
    return f"sha256 {sha256_of(Path(path).expanduser())}"
