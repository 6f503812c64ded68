"""The items that bulk encoding takes, and the methods that it needs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from gen2embed_mteb.images.decoding import Size
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import Images, open_input
from gen2embed_mteb.names import Side


class Item(NamedTuple):
    """One input to encode: a text and the paths of its images; hashable, and equal if both are equal."""

    text: str
    images: tuple[str, ...] = ()


class Fault(NamedTuple):
    """The reason why an item has no vector, and the file at fault (empty if the item itself is at fault)."""

    file: str
    reason: str


class Encoder(Protocol):
    """The methods that bulk encoding needs of a model; `Gen2Embed` has them.

    An encoder of text alone has an attribute `text_alone`, a text that says so: data with images is then refused before
    anything is encoded.

    Both methods take a list of `{"text": str, "image": PIL image or list of them}`, of which one key may be missing,
    and return an array-like of shape (n, d), one row of norm 1 per input.
    """

    def encode_query(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode queries, and return (n, d) float32 unit rows."""

    def encode_document(self, inputs: list[dict[str, Any]], /) -> Any:
        """Encode candidates, and return (n, d) float32 unit rows."""


class PromptedEncoder(Encoder, Protocol):
    """An encoder with the prompts of one dataset: the same input has another vector under other prompts."""

    @property
    def prompts(self) -> Mapping[Side, str]:
        """The prompts by side; they tell such encoders of one model apart."""


@runtime_checkable
class DatasetEncoder(Protocol):
    """An encoder whose prompts can depend on the dataset."""

    def for_dataset(self, dataset: str, /) -> PromptedEncoder | None:
        """Return the encoder with the prompts of a dataset; None if it has none for it."""


@runtime_checkable
class StagedEncoder(Protocol):
    """An encoder that works in stages, so that the next batch can be prepared while the model runs the present one."""

    @property
    def batch_tokens(self) -> int:
        """The number of tokens per call, padding included, that suits the model's device."""

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Return the lengths of n inputs in tokens, given their texts and the (width, height) of their images."""

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> Any:
        """Do all work that comes before the model, on the CPU; only one thread at a time calls this."""

    def encode_prepared(self, side: Side, batch: Any) -> Any:
        """Run the model on what `prepare` returned, and return (n, d) float32 unit rows."""


class Preparer(Protocol):
    """The part of an encoder that prepares batches in another process; it can be pickled, and has no weights."""

    def __call__(self, arguments: Any, inputs: list[dict[str, Any]], /) -> Mapping[str, Any]:
        """Do most of what `prepare` does, and return arrays of numbers by name."""


@runtime_checkable
class SplitEncoder(StagedEncoder, Protocol):
    """An encoder whose batches can be prepared in worker processes, with the vectors the same to the bit."""

    @property
    def computes_on_cpu(self) -> bool:
        """Whether the model runs on the CPU, whose cores workers would take from it."""

    def preparer(self) -> Preparer:
        """Return what prepares in another process; the same for all datasets of one model."""

    def arguments(self, side: Side) -> Any:
        """Return what the preparer is to know of a batch, as JSON can hold it."""

    def completed(self, side: Side, arrays: Mapping[str, Any]) -> Any:
        """Make of the preparer's arrays what `prepare` returns; several threads may call this."""


@runtime_checkable
class Expecting(Protocol):
    """Images that compare a file with its digest before they open it; `ImageSource` has them."""

    def kept_bytes(self, path: str, /) -> bytes | None:
        """Return the file from which the image's facts were read, if it is still kept."""

    def expect(self, path: str, digest: str, data: bytes | None = None, /) -> None:
        """Say which digest the file must have that is opened next under this path, or hand over the file itself."""


@dataclass(frozen=True)
class Opener:
    """Opens the images of an input; see `open_input`."""

    images: Images
    options: ImageOptions

    def __call__(self, text: str, paths: Sequence[str], digests: Sequence[str]) -> dict[str, Any]:
        """Return what encoders take.

        Raises:
            ImageError: An image cannot be opened, or its file is not the one that has the digest.
        """
        if isinstance(self.images, Expecting):
            for path, digest in zip(paths, digests, strict=True):
                self.images.expect(path, digest)
        return open_input(self.images, text, paths, self.options)


def staged(encoder: Encoder) -> StagedEncoder:
    """Return the encoder as one that works in stages; a plain encoder is wrapped."""
    return encoder if isinstance(encoder, StagedEncoder) else _Unstaged(encoder)


class _Unstaged:
    """A wrapper that makes a plain `Encoder` a `StagedEncoder`; lengths are estimates."""

    batch_tokens = 8192

    def __init__(self, encoder: Encoder) -> None:
        self._encode = {"query": encoder.encode_query, "document": encoder.encode_document}

    def count_tokens(self, side: Side, texts: Sequence[str], image_sizes: Sequence[Sequence[Size]]) -> list[int]:
        return [1 + len(text) // 4 + 256 * len(sizes) for text, sizes in zip(texts, image_sizes, strict=True)]

    def prepare(self, side: Side, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def encode_prepared(self, side: Side, batch: list[dict[str, Any]]) -> Any:
        return self._encode[side](batch)
