"""Converting mteb's batches to inputs of `Gen2Embed`: the side of every input, its text with instruction, its images.

If mteb names a side, `query` or `document`, that side is used, except for RefCOCO-Matching, whose candidates are
encoded as queries. If mteb names none:

| task                                            | query    | document |
|-------------------------------------------------|----------|----------|
| zero-shot classification                        | inputs   | labels   |
| compositionality (an image and its captions)    | captions | images   |
| all others: both sides are alike (STS, clusters)| inputs   |          |

Captions are queries because the official Gen2Embed code encodes them so (see `sugarcrepe/evaluate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.preparation.inputs import described, text_of
from gen2embed_mteb.images.decoding import ImageFacts, image_digest
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.modes import to_rgb
from gen2embed_mteb.mteb_plugin.names import DATASETS
from gen2embed_mteb.names import Side


def side_of(task_metadata: Any, prompt_type: Any, inputs: Any, *, after_labels: bool = False) -> Side:
    """Return the side of the inputs in a call of `encode`.

    Args:
        task_metadata: mteb's `TaskMetadata`.
        prompt_type: mteb's `PromptType`, or None.
        inputs: The data loader that was passed to `encode`.
        after_labels: Whether the previous call encoded the labels of this zero-shot task. mteb passes the labels first;
            if the inputs are text as well, only this order distinguishes them.

    Returns:
        `query` or `document`; see the module's docstring.
    """
    dataset = DATASETS.get(task_metadata.name)
    if prompt_type is not None:
        as_query = prompt_type.value == "query" or (dataset is not None and dataset.candidates_as_queries)
        return "query" if as_query else "document"
    has_images = "image" in inputs.dataset.features
    if task_metadata.type == "Compositionality":
        return "document" if has_images else "query"
    if task_metadata.type == "ZeroShotClassification":
        of_text_alone = "image" not in task_metadata.modalities
        return "query" if has_images or (of_text_alone and after_labels) else "document"
    return "query"


def with_instruction(instruction: str, text: str) -> str:
    """Put an instruction before a text.

    As in MMEB, an instruction that ends in a colon is followed by the text; any other has a line of its own.
    """
    instruction = instruction.strip()
    if not instruction or not text:
        return instruction or text
    return f"{instruction} {text}" if instruction.endswith(":") else f"{instruction}\n{text}"


class HeldImages:
    """Decoded images in memory, named by a digest of their content, until they are released."""

    def __init__(self) -> None:
        """Start without images."""
        self._held: dict[str, Image.Image] = {}
        self.num_pixels = 0

    def hold(self, image: Image.Image) -> str:
        """Keep an image in mode RGB, and return the name by which it can be opened.

        Raises:
            ImageError: The image is closed, cut off or damaged.
            TypeError: It is not a PIL image.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"an image must be a PIL image, got {described(image)}")
        rgb = to_rgb(image)
        name = image_digest(rgb)
        if name not in self._held:
            self._held[name] = rgb
            self.num_pixels += image.width * image.height
        return name

    def release(self) -> None:
        """Free the memory of all images; images that were encoded are not needed again."""
        self._held.clear()
        self.num_pixels = 0

    def facts(self, path: str) -> ImageFacts:
        """Return an image's digest and size."""
        return ImageFacts(path, self._find(path).size)

    def open(self, path: str) -> Image.Image:
        """Return an image, mode RGB."""
        return self._find(path)

    def _find(self, name: str) -> Image.Image:
        if name not in self._held:
            raise ImageError(name, "not held any more", "report this as a defect of Gen2Embed")
        return self._held[name]


def items_of(
    batch: Mapping[str, Any], side: Side, task_metadata: Any, instruction: str, images: HeldImages
) -> Iterator[Item]:
    """Read one batch of mteb.

    Args:
        batch: Columns by name: `text`, `image`, and those that mteb adds (`query`, `instruction`, `body`, `title`).
        side: The batch's side; documents get no instruction.
        task_metadata: mteb's `TaskMetadata`.
        instruction: The task's instruction, possibly empty.
        images: Receives the batch's images.

    Yields:
        One item per row, in order.

    Raises:
        ImageError: An image cannot be used.
        TypeError: A text is not a string, or an image is not a PIL image.
    """
    for row in range(len(next(iter(batch.values())))):
        given = batch["image"][row] if "image" in batch else None
        listed = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
        text = _text(batch, row, task_metadata.name)
        if side == "query":
            text = with_instruction(instruction, with_instruction(_cell(batch, "instruction", row), text))
        yield Item(text, tuple(images.hold(image) for image in listed))


def _text(batch: Mapping[str, Any], row: int, task: str) -> str:
    """Return the text of a row without the instruction, which mteb appends to the query in the column `text`."""
    if "query" in batch:
        query, instruction = _cell(batch, "query", row), _cell(batch, "instruction", row)
        # mteb's cache of embeddings reads a batch a second time, and then uses the joined text as the query.
        return query.removesuffix(f" {instruction}") if instruction else query
    if "body" in batch and task in DATASETS:
        return _cell(batch, "body", row)  # `text` is the body without the newline at its end
    return _cell(batch, "text", row)


def _cell(batch: Mapping[str, Any], column: str, row: int) -> str:
    return text_of(batch[column][row], f"column {column!r}, row {row} of a batch") if column in batch else ""
