"""Opens the cells of training data and makes model features of them.

A cell is what `Gen2Embed` takes, by the same rule (`inputs.content_of`): a text (a string is always text), a PIL image,
a `pathlib.Path`, a dict of "text" and "image" (or "images") in which either key may be missing or None, or
`{"bytes", "path"}`, as `datasets` stores an image. What a cell may state beyond that is in `stated_facts.py`.

Images are opened when their batch is made (in the data loader's workers, if there are any), and are resized before the
model's processor gets them. Rows are padded on the right: the cached loss then cuts every sub-batch to its own width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gen2embed_mteb.embedder.preparation.features import NO_LIMIT
from gen2embed_mteb.embedder.preparation.inputs import Content, content_of
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource
from trainers.batches.image_rows import ImageRows
from trainers.batches.stated_facts import facts_of, is_absent, without_facts
from trainers.data.cells import read_cell

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


_NOTHING = Content("")
"""What is read in place of a negative that a row does not have."""


class CellReader:
    """Makes features of a column's cells; a data collator calls it as its `preprocess_fn`.

    Args:
        model: The model, which renders and tokenizes.
        images: Opens images by path; None: the model opens them, under its `image_root` if it has one.
        image_options: The size to which images are resized; None: the recipe's, 448 x 448.
        max_length: The longest input in tokens, where the model allows as much; None: the model's own limit.

    Attributes:
        states_facts: Whether the loss reads the features of `stated_facts.py`. Only then may negatives be missing.
    """

    def __init__(
        self,
        model: Gen2Embed,
        images: ImageSource | None = None,
        image_options: ImageOptions | None = None,
        max_length: int | None = None,
    ) -> None:
        """Store the arguments; nothing is opened yet."""
        self._model = model
        self._images = images
        self._image_options = image_options or ImageOptions(resize="square-448")
        # The model's own setting is not changed: it is saved with the model, and inference takes larger images.
        known = [length for length in (max_length, model.max_seq_length) if length is not None]
        self._limit = {"max_length": min(known)} if known else {}
        self._image_rows = ImageRows(model[0])
        self.states_facts = False

    def __call__(self, cells: list[Any], prompt: str | None = None, task: str | None = None) -> dict[str, Any]:
        """Open, render and tokenize n cells.

        Args:
            cells: The n cells, of one column.
            prompt: A system prompt in place of the strategy's.
            task: `query` or `document`.

        Returns:
            The model's features, n rows, padded on the right.

        Raises:
            ImageError: An image cannot be opened.
            TypeError: A cell is of a kind that this module's docstring does not name.
            ValueError: A cell is empty, or cannot be shortened to the model's length.
        """
        opened = [_NOTHING if self.states_facts and is_absent(cell) else self.content(cell) for cell in cells]
        contents = self._model.fitted(opened, prompt, task=task, **self._limit)
        padding = {"text": {"padding_side": "right"}}
        features = self._model.preprocess(contents, task=task, processing_kwargs=padding, max_length=NO_LIMIT)
        self._image_rows.add(features, contents)
        return {**features, **facts_of(cells)} if self.states_facts else features

    def content(self, cell: Any) -> Content:
        """Open one cell."""
        cell = without_facts(cell)
        if isinstance(cell, dict) and "role" not in cell:
            text, images = read_cell(cell)
            cell = {"text": text, "image": list(images)}
        return content_of(cell, self._model.image_root, self._image_options, source=self._images)
