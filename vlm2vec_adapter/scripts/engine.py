"""`Gen2Embed` with the methods that VLM2Vec's scripts call on a model.

VLM2Vec's worker processes prepare batches, and its main process computes vectors. VLM2Vec decides the size of a batch
of its loader (`--per_device_eval_batch_size`). For the model, each batch is sorted by length, prompt and images
included, and divided by `batch_tokens`. Candidates are prepared as candidates and queries as queries, whatever the
loader calls the side. Vectors are float32 unit rows, computed outside of the autocast that VLM2Vec uses in some calls.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gen2embed_mteb.bulk.encoder import cut_batches
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder, Prepared
from gen2embed_mteb.embedder.preparation.inputs import described, text_of
from gen2embed_mteb.images.decoding import Size, decode, facts_of
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions, fitted, fitted_size
from gen2embed_mteb.images.source import ImageSource, open_input
from gen2embed_mteb.mmeb.row_text import drop_unmatched_markers
from gen2embed_mteb.names import Side

KEY = "gen2embed"
"""The key of a batch in the dictionary that VLM2Vec's loops pass as the inputs of a model."""

NUM_HEADER_THREADS = 8
MAX_SHOWN = 5


class Sample(NamedTuple):
    """One input of VLM2Vec: its text, without markers of images that it lacks, and its image.

    The image is a path relative to the image folder, or the bytes of an image file; `None` if there is none.
    """

    text: str
    image: str | bytes | None = None

    @classmethod
    def of(cls, text: str, image: str | bytes | None) -> Sample:
        """Return a sample in MMEB's form: an empty path means no image, and a marker without an image is removed.

        Raises:
            TypeError: The text is not a string, or the image is neither a path nor the bytes of a file.
        """
        if image is not None and not isinstance(image, (str, bytes)):
            raise TypeError(f"an image must be a path or the bytes of a file, got {described(image)}")
        return cls(drop_unmatched_markers(text_of(text, "a text"), 1 if image else 0), image or None)


class Part(NamedTuple):
    """One call of the model: the numbers of its rows in the batch, and its prepared inputs."""

    rows: list[int]
    prepared: Prepared


class Batch(NamedTuple):
    """A batch of `num_rows` rows from a worker, with the parts that this process must encode."""

    side: Side
    num_rows: int
    parts: list[Part]


class Engine(nn.Module):
    """A `Gen2Embed` model with the few methods that VLM2Vec's scripts call.

    Args:
        model: The model.
        batch_tokens: The most tokens per call of the model, padding included; `None` stands for a number that suits its
            device.
        image_options: How images are resized.
        share: The rows of every batch that belong to this process; the vectors of others are gathered.
    """

    def __init__(
        self,
        model: Gen2Embed,
        *,
        batch_tokens: int | None,
        image_options: ImageOptions,
        share: Share | None = None,
    ) -> None:
        """Keep the arguments; `to` runs the prompt's shared prefix once the model is on its final device."""
        super().__init__()
        self.model = model
        self._batch_tokens = batch_tokens
        self._image_options = image_options
        self._share = share or Share()
        self._encoder = PrefixEncoder(model)

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> Engine:
        """Move the model to a device; a type that VLM2Vec asks for is ignored, as `--gen2embed_dtype` sets the type.

        The prompt's shared prefix is run here, since workers need its length but must not use the device.
        """
        if device is not None:
            self.model.to(device)
        self._encoder = PrefixEncoder(self.model)
        sides: tuple[Side, Side] = ("query", "document")
        for side in sides:
            self._encoder.count_tokens(side, [""], [[]])
        return self

    def sorted_order(self, side: Side, samples: Sequence[Sample], images: ImageSource | None) -> list[int]:
        """Return the order by length in tokens, longest first, so that a lack of memory shows at once.

        Args:
            side: The side of all samples.
            samples: n inputs.
            images: The source of their images.

        Returns:
            A permutation of `range(n)`; the resulting order depends only on the samples' content.

        Raises:
            ImageError: Images cannot be used; the message names the first ones, before anything was encoded.
        """
        with ThreadPoolExecutor(NUM_HEADER_THREADS, thread_name_prefix="header") as pool:
            found = list(pool.map(lambda sample: self._sizes(sample, images), samples))
        faults = [fault for fault in found if isinstance(fault, ImageError)]
        if faults:
            shown = "; ".join(f"{fault.file}: {fault.reason}" for fault in faults[:MAX_SHOWN])
            raise ImageError(faults[0].file, f"{len(faults)} images cannot be used ({shown})", faults[0].remedy)
        sizes = [size.final for size in found if not isinstance(size, ImageError)]
        lengths = self._encoder.count_tokens(side, [sample.text for sample in samples], sizes)
        return sorted(range(len(samples)), key=lambda row: (-lengths[row], samples[row].text, str(samples[row].image)))

    def prepare(self, side: Side, samples: Sequence[Sample], images: ImageSource | None) -> Batch:
        """Open, render and tokenize this process's rows of a batch; runs in VLM2Vec's workers.

        Args:
            side: The side of all samples.
            samples: The batch.
            images: The source of its images.

        Raises:
            ImageError: An image cannot be opened.
            ValueError: An input cannot be made to fit into `--max_len`.
        """
        own = list(range(self._share.rank, len(samples), self._share.world_size))
        # Sizes come from headers: images are opened part by part, as a whole batch of large ones may not fit in memory.
        found = [self._sizes(samples[row], images) for row in own]
        sizes = []
        for row_sizes in found:
            if isinstance(row_sizes, ImageError):
                raise row_sizes
            sizes.append(row_sizes)
        lengths = self._encoder.count_tokens(side, [samples[row].text for row in own], [row.final for row in sizes])
        order = sorted(range(len(own)), key=lambda place: -lengths[place])
        tokens = self._batch_tokens or self._encoder.batch_tokens
        pixels = [sizes[place].num_pixels for place in order]
        parts = []
        for start, stop in cut_batches([lengths[place] for place in order], tokens, len(own), pixels):
            rows = [own[place] for place in order[start:stop]]
            parts.append(Part(rows, self._encoder.prepare(side, [self._open(samples[row], images) for row in rows])))
        return Batch(side, len(samples), parts)

    def forward(self, qry: dict[str, Any] | None = None, tgt: dict[str, Any] | None = None) -> dict[str, Any]:
        """Encode the batch of one side; VLM2Vec calls this.

        Args:
            qry: A dictionary with the batch of queries from `prepare` under `KEY`.
            tgt: The same for candidates.

        Returns:
            `qry_reps` and `tgt_reps`, each (n, d) float32 unit rows on the CPU, or `None`.
        """
        return {
            "qry_reps": self._encode(qry[KEY]) if qry else None,
            "tgt_reps": self._encode(tgt[KEY]) if tgt else None,
        }

    def _encode(self, batch: Batch) -> torch.Tensor:
        # A script's autocast would convert float32 weights to bfloat16, and in v1 only for queries.
        with torch.autocast(self.model.device.type, enabled=False):
            made = [(part.rows, self._vectors(batch.side, part)) for part in batch.parts]
        if self._share.world_size > 1:
            shares: list[list[tuple[list[int], npt.NDArray[np.float32]]]] = [[] for _ in range(self._share.world_size)]
            torch.distributed.all_gather_object(shares, made)
            made = [piece for share in shares for piece in share]
        order = np.argsort([row for rows, _ in made for row in rows])
        return torch.from_numpy(np.concatenate([vectors for _, vectors in made])[order])

    def _vectors(self, side: Side, part: Part) -> npt.NDArray[np.float32]:
        try:
            return self._encoder.encode_prepared(side, part.prepared)
        except torch.OutOfMemoryError as error:
            tokens = part.prepared.input_ids.numel()
            raise RuntimeError(
                f"out of memory at {len(part.rows)} inputs, {tokens} tokens: pass --gen2embed_batch_tokens "
                f"{max(1, tokens // 2)}"
            ) from error

    def _open(self, sample: Sample, images: ImageSource | None) -> dict[str, Any]:
        if isinstance(sample.image, bytes):
            image = decode(io.BytesIO(sample.image), "<bytes>", exif_orientation=self._image_options.exif_orientation)
            return {
                "text": sample.text,
                "image": fitted(image, self._image_options, "<bytes>"),
            }
        if sample.image is None:
            return {"text": sample.text}
        return open_input(_given(images, sample.image), sample.text, [sample.image], self._image_options)

    def _sizes(self, sample: Sample, images: ImageSource | None) -> _Sizes | ImageError:
        """Return the sizes of a sample's images when they reach the processor, computed from their headers."""
        if sample.image is None:
            return _Sizes([], 0)
        name = sample.image if isinstance(sample.image, str) else "<bytes>"
        try:
            if isinstance(sample.image, bytes):
                facts = facts_of(sample.image, "<bytes>", exif_orientation=self._image_options.exif_orientation)
            else:
                facts = _given(images, sample.image).facts(sample.image)
            final = fitted_size(facts.size, self._image_options, name)
        except ImageError as error:
            return error
        return _Sizes([final], max(math.prod(facts.size), math.prod(final)))


class _Sizes(NamedTuple):
    """The sizes of a sample's images when they reach the processor, and the pixels that they take in memory."""

    final: list[Size]
    num_pixels: int


def _given(images: ImageSource | None, path: str) -> ImageSource:
    if images is None:
        raise ImageError(path, "no image folder was given", "pass --image_dir (v1) or --data_basedir (V2)")
    return images
