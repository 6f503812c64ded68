"""From mteb's batches to what `Gen2Embed` encodes: the side of every input, its text with instruction, its images.

Sides. Where mteb says `query` or `document`, that holds, but for RefCOCO-Matching, whose candidates are queries. Where
it says nothing:

| task                                            | query    | document |
|-------------------------------------------------|----------|----------|
| zero-shot classification                        | inputs   | labels   |
| compositionality (an image and its captions)    | captions | images   |
| all others: both sides are alike (STS, clusters)| inputs   |          |

Captions as queries are what the official Gen2Embed code does (see `compositionality.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.inputs import described, text_of
from gen2embed_mteb.images.decoding import ImageFacts, image_digest
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.modes import to_rgb
from gen2embed_mteb.mteb_plugin.names import DATASETS
from gen2embed_mteb.names import Side


def side_of(task_metadata: Any, prompt_type: Any, inputs: Any, *, after_labels: bool = False) -> Side:
    """Tell on which side a call of `encode` is.

    Args:
        task_metadata: mteb's `TaskMetadata`.
        prompt_type: mteb's `PromptType`, or None.
        inputs: The data loader that `encode` was given.
        after_labels: Whether the call before was for the labels of this zero-shot task. mteb hands them over first,
            which is all that tells them apart where the inputs are text as well.

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

    As in MMEB, one that ends in a colon is followed by the text; any other stands on a line of its own.
    """
    instruction = instruction.strip()
    if not instruction or not text:
        return instruction or text
    return f"{instruction} {text}" if instruction.endswith(":") else f"{instruction}\n{text}"


class HeldImages:
    """Images that the caller has decoded, named by their content, until they are let go."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._held: dict[str, Image.Image] = {}
        self.num_pixels = 0

    def hold(self, image: Image.Image) -> str:
        """Keep an image, as RGB, and returns the name under which it is found.

        Raises:
            ImageError: It is closed, cut off or damaged.
            TypeError: It is no PIL image.
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
        """Let all images go; those that were encoded are not asked for again."""
        self._held.clear()
        self.num_pixels = 0

    def facts(self, path: str) -> ImageFacts:
        """Tell an image's digest and size."""
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
        One item a row, in order.

    Raises:
        ImageError: An image cannot be used.
        TypeError: A text is no string, or an image no PIL image.
    """
    for row in range(len(next(iter(batch.values())))):
        given = batch["image"][row] if "image" in batch else None
        listed = [] if given is None else given if isinstance(given, (list, tuple)) else [given]
        text = _text(batch, row, task_metadata.name)
        if side == "query":
            text = with_instruction(instruction, with_instruction(_cell(batch, "instruction", row), text))
        yield Item(text, tuple(images.hold(image) for image in listed))


def _text(batch: Mapping[str, Any], row: int, task: str) -> str:
    """Return the text of a row without instruction: mteb's `text` has it glued to the query's end."""
    if "query" in batch:
        query, instruction = _cell(batch, "query", row), _cell(batch, "instruction", row)
        # mteb's cache of embeddings reads a batch a second time, and takes the glued text for the query.
        return query.removesuffix(f" {instruction}") if instruction else query
    if "body" in batch and task in DATASETS:
        return _cell(batch, "body", row)  # `text` is the body without the newline at its end
    return _cell(batch, "text", row)


def _cell(batch: Mapping[str, Any], column: str, row: int) -> str:
    return text_of(batch[column][row], f"column {column!r}, row {row} of a batch") if column in batch else ""
