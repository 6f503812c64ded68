"""Encoding one part: a pure function of the part's content, the model and the settings, whoever calls it.

    with ShardWorker(encoder, job) as worker:       # one per process, with the model
        record = encode_shard(part, worker)         # a plain description in, a small record out

`encode_shard` reads the part's rows, digests them, and returns at once if the output folder has vectors of the same
content. Otherwise it encodes every distinct input of the part once, in batches sorted by length, and writes the part's
files under temporary names that are renamed once. A part that is encoded twice, by whichever process, has the same
bytes. `EncodeJob` and `Part` can be pickled; so any driver can hand parts to any number of workers.

Its first half, `read_part`, does not touch the model: a thread may read the next part while this one is encoded.

Memory holds one part, its texts and its vectors, and the texts of the next. Images that are embedded in a table lie on
the disk until the part is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.encoder import BulkEncoder, digests_of
from gen2embed_mteb.bulk.image_facts import FactsReader
from gen2embed_mteb.bulk.processes import Peers, Share
from gen2embed_mteb.bulk.store import EmbeddingStore, Shard, StoredShard
from gen2embed_mteb.bulk.types import Encoder, Fault, Item
from gen2embed_mteb.data_files.rows import BadRow
from gen2embed_mteb.encode_command.opening import require_apart
from gen2embed_mteb.encode_command.options import PICTURES, EncodeOptions
from gen2embed_mteb.encode_command.part_files import part_bytes
from gen2embed_mteb.encode_command.parts_folder import PartRecord, PartsFolder
from gen2embed_mteb.encode_command.row_images import RowImages
from gen2embed_mteb.encode_command.rows import Row
from gen2embed_mteb.encode_command.sources import Part, Source
from gen2embed_mteb.encode_command.vectors import rounded, shortened
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.decoding import ImageFacts
from gen2embed_mteb.names import Side


@dataclass(frozen=True)
class EncodeJob:
    """All that a worker needs besides the model; it can be pickled.

    Attributes:
        options: The settings.
        source: The input.
        fingerprint: The digest of everything that decides the model's vectors.

    Raises:
        DataError: The output folder is the folder of the input.
    """

    options: EncodeOptions
    source: Source
    fingerprint: str

    def __post_init__(self) -> None:
        """Refuse an output folder whose files would be read as input; see `require_apart`."""
        require_apart(self.options)

    def settings(self) -> dict[str, Any]:
        """Return all that decides which rows are read and what is written, by name; it can be written as JSON."""
        names = (
            *("side", "resize", "min_side", "precision", "truncate_dim", "rows_per_shard", "keep_text", "split"),
            *("subset", "image_dir", "max_text_chars", "max_candidates", "max_row_bytes", "follow_links"),
        )
        options = self.options
        return {
            "input": options.input,
            "kind": self.source.kind,
            "columns": dict(zip(self.source.columns._fields, self.source.columns, strict=True)),
            "fingerprint": self.fingerprint,
            "format": options.file_format,
            **{name: getattr(options, name) for name in names},
            **options.orientation(),
        }

    def folder(self) -> PartsFolder:
        """Return the output folder."""
        return PartsFolder(Path(self.options.output_dir).expanduser(), self.settings())

    @property
    def has_texts(self) -> bool:
        """Whether texts are written beside the vectors."""
        return self.options.keep_text and bool(self.source.columns.text)

    @property
    def has_images(self) -> bool:
        """Whether paths of images are written beside the vectors; of pictures the id is the path."""
        return self.options.keep_text and bool(self.source.columns.image) and self.source.kind != PICTURES


class ShardWorker:
    """A model with what it needs to encode parts of one job, one after the other; use it in a `with` statement.

    Args:
        encoder: The model.
        job: The job.
    """

    def __init__(self, encoder: Encoder, job: EncodeJob) -> None:
        """Keep the arguments; nothing is read yet."""
        self.job, self.folder, options = job, job.folder(), job.options
        with ExitStack() as ending:
            self.images = RowImages(
                job.source.image_root,
                ending.enter_context(self.folder.scratch()),
                follow_links=options.follow_links,
                exif_orientation=options.exif_orientation,
                remote_images=options.remote_images,
            )
            self.facts = FactsReader(self.images, options.image_options(), None, Share(), Peers(Share()))
            self.bulk = PartEncoder(
                encoder,
                _OnePart(),
                self.images,
                batch_tokens=options.batch_tokens,
                batch_size=options.batch_size,
                image_options=options.image_options(),
                num_workers=options.num_workers,
            )
            self._ending = ending.pop_all()

    def __enter__(self) -> ShardWorker:
        """Return the worker."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the images that were kept for the last part."""
        self._ending.close()


class PartInputs(NamedTuple):
    """A part that was read.

    Attributes:
        part: The part.
        rows: Its good rows.
        items: What is encoded of each.
        errors: Its faulty rows, by their numbers in the input.
        facts: Digest and size of every image, or what is wrong with it.
        embedded: The images that wait on the disk, as `RowImages.forget` takes them.
        content: The digest of all.
    """

    part: Part
    rows: list[Row]
    items: list[Item]
    errors: dict[int, list[Any]]
    facts: dict[str, ImageFacts | Fault]
    embedded: set[str]
    content: str


def encode_shard(part: Part, worker: ShardWorker, label: str = "") -> PartRecord:
    """Encode a part and write its files, unless that was done before: `read_part`, then `encode_part`.

    Args:
        part: The part.
        worker: The model and the job.
        label: The name of the part in the progress bar.

    Returns:
        What was made: the files with their digests, and the rows that were set aside.

    Raises:
        Gen2EmbedError: The input cannot be read, has other rows than before, or vectors are shorter than
            `truncate_dim`.
        TypeError: The model returns something other than unit rows.
        OSError: The system cannot read or write a file.
    """
    return encode_part(read_part(part, worker, label), worker, label)


def read_part(part: Part, worker: ShardWorker, label: str = "") -> PartInputs:
    """Read a part; embedded images go to the disk, and of all images digest and size are read.

    Another part may be encoded at the same time. What is returned must be given to `encode_part`, or its `embedded` to
    `RowImages.forget`.

    Args:
        part: The part.
        worker: The job; the model is not used.
        label: The name of the part in the progress bar.

    Raises:
        Gen2EmbedError: The input cannot be read, or has other rows than before.
        OSError: The system cannot read or write a file.
    """
    rows: list[Row] = []
    items: list[Item] = []
    errors: dict[int, list[Any]] = {}
    embedded: set[str] = set()
    try:
        for row in worker.job.source.rows(part, worker.job.options):
            worker.images.require_wanted()
            if isinstance(row, BadRow):
                errors[row.index] = [row.index, "", row.file, row.reason]
                continue
            paths = tuple(
                worker.images.keep(image, embedded) if isinstance(image, bytes) else image for image in row.images
            )
            # The row is kept without the bytes of its images.
            rows.append(replace(row, images=tuple(image for image in row.images if isinstance(image, str))))
            items.append(Item(row.text, paths))
        if len(rows) + len(errors) != part.num_rows:
            raise Gen2EmbedError(
                f"{worker.job.source.source}: part {part.number} has {len(rows) + len(errors)} rows now, "
                f"{part.num_rows} when it was cut; leave the input as it is while it is encoded, and run the same "
                "command again"
            )
        paths_of_all = {path for item in items for path in item.images}
        facts = worker.facts.read(paths_of_all, label or f"part {part.number}")
    except BaseException:
        worker.images.forget(embedded)
        raise
    digest = hashlib.sha256()
    for row, item in zip(rows, items, strict=True):
        described = [row.index, row.id, row.text, row.images, list(digests_of(item, facts))]
        digest.update(json.dumps(described).encode())
    digest.update(json.dumps(sorted(errors.items())).encode())
    return PartInputs(part, rows, items, errors, facts, embedded, digest.hexdigest())


def encode_part(inputs: PartInputs, worker: ShardWorker, label: str = "") -> PartRecord:
    """Encode a part that was read, and write its files, unless that was done before.

    Args:
        inputs: What `read_part` returned.
        worker: The model and the job.
        label: The name of the part in the progress bar.

    Returns:
        As `encode_shard`, and its errors are raised, but for those of `read_part`.
    """
    job, bulk, part = worker.job, worker.bulk, inputs.part
    try:
        found = worker.folder.find(part.number, inputs.content)
        if found is not None:
            return found
        halvings, side = bulk.num_halvings, job.options.side
        bulk.begin(inputs.facts)
        bulk.add(side, inputs.items, label or f"part {part.number}")
        errors, good = dict(inputs.errors), []
        for number, (row, item) in enumerate(zip(inputs.rows, inputs.items, strict=True)):
            if fault := bulk.fault(side, item):
                errors[row.index] = [row.index, row.id, fault.file or (job.source.source), fault.reason]
            else:
                good.append(number)
        rows = [inputs.rows[number] for number in good]
        vectors = _vectors(bulk, side, [inputs.items[number] for number in good], job.options.truncate_dim)
        record = PartRecord(
            part.number,
            inputs.content,
            part.num_rows,
            len(rows),
            vectors.shape[1],
            errors=[errors[index] for index in sorted(errors)],
            num_halvings=bulk.num_halvings - halvings,
        )
        files = {}
        if rows:
            options = job.options
            stored = rounded(vectors, options.precision)
            facts = {name: job.settings()[name] for name in ("fingerprint", "side", "precision")}
            described = json.dumps(facts, sort_keys=True)
            files = part_bytes(
                part.number,
                rows,
                stored,
                file_format=options.file_format,
                texts=job.has_texts,
                images=job.has_images,
                facts=described,
            )
        return worker.folder.put(record, files)
    finally:
        bulk.forget()
        worker.images.drop_bytes(inputs.facts)
        worker.images.forget(inputs.embedded)


def content_of(part: Part, worker: ShardWorker) -> str:
    """Return the digest of the content of a part, without encoding anything."""
    inputs = read_part(part, worker)
    worker.images.forget(inputs.embedded)
    return inputs.content


def _vectors(bulk: PartEncoder, side: Side, items: list[Item], dim: int | None) -> npt.NDArray[np.float32]:
    return shortened(bulk.vectors(side, items), dim)


class PartEncoder(BulkEncoder):
    """Bulk encoding of one part after the other: what is known of a part is dropped before the next one."""

    def begin(self, facts: Mapping[str, ImageFacts | Fault]) -> None:
        """Take over what is known of the images of a part, before its items are added."""
        self._facts = dict(facts)

    def forget(self) -> None:
        """Drop the items and images of a part, so that memory does not grow with the number of parts."""
        self._shards, self._places, self._facts = [], {}, {}


@dataclass(frozen=True)
class _HeldShard(StoredShard):
    """A shard in memory."""

    held: npt.NDArray[np.float32] | None = None

    @property
    def vectors(self) -> npt.NDArray[np.float32]:
        """(rows, d) float32."""
        if self.held is None:
            raise KeyError(self.path)
        return self.held


class _OnePart(EmbeddingStore):
    """The store of one part, in memory: a part is what is stored, so that nothing smaller needs a file."""

    def __init__(self) -> None:
        self.directory = Path()

    def get(self, key: str, num_rows: int | None = None) -> StoredShard | None:
        """Return nothing: within a part every distinct input is encoded once."""
        return None

    def put(self, key: str, shard: Shard) -> StoredShard:
        """Keep a shard; it lives as long as the bulk encoder refers to it."""
        rows, width = shard.vectors.shape
        return _HeldShard(Path(key), rows, width, shard.errors, shard.num_halvings, shard.vectors)
