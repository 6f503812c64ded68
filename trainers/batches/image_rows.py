"""Cutting the features of a batch into mini-batches, whatever shape a processor gives its images.

Each row of `input_ids` belongs to one input, but a processor may put the images of all inputs into one tensor: a row
per image (LLaVA), a row per patch (Qwen2-VL), or a row per tile, where the number of tiles depends on the image's size
(InternVL). sentence-transformers 6.2 cuts the first two (`gradcache._create_minibatch`). It raises an error for the
third, for side features such as LLaVA-OneVision's `batch_num_images`, and where a mini-batch of texts is cut from a
batch with padded images (Idefics3).

For these families `ImageRows` asks the processor itself: it processes blank images of the same sizes, alone, and
counts the rows of every feature. "Rows" may lie along another axis (MiniCPM-V). Some features hold indices into the
rows of the whole batch (Molmo 2): from these the first index of the mini-batch is subtracted. Cost: one run of the
processor per new combination of sizes (5 to 20 ms), none for the families that sentence-transformers can cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from sentence_transformers.base.losses.gradcache import _create_minibatch
from torch import Tensor

from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.images.decoding import Size

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

NUM_ROWS = "_num_rows"
"""The suffix of the features (n,) int64 that say how many rows of another feature belong to each input."""
FIRST_INDEX = "_first_index"
"""The suffix of the features (n,) int64 that say from which number the indices in a feature count for each input."""
AXIS = "_axis"
"""The suffix of the features (n,) int64 that all say along which axis the rows of a feature lie, if not the first."""

_ROUNDING, _COARSE = 1e-3, 0.1
"""The largest differences of unit vectors that count as rounding, in float32 and in half precision."""
_COUNT = "num_images_per_sample"
_PER_IMAGE = frozenset({"pixel_values", "image_position_ids", "image_sizes"})
_PER_PATCH = frozenset({"pixel_values", "image_grid_thw"})


class ImageRows:
    """Counts which rows of the image features belong to which input.

    Args:
        transformer: The first module of the model.
    """

    def __init__(self, transformer: Any) -> None:
        """Keep the module; nothing is processed yet."""
        self._transformer = transformer
        self._probed = False
        self._per_input: frozenset[str] = frozenset()
        self._indices: frozenset[str] = frozenset()
        self._axes: dict[str, int] = {}
        self._counted: dict[tuple[Size, ...], dict[str, tuple[int, int]]] = {}

    def add(self, features: dict[str, Any], contents: Sequence[Content]) -> None:
        """Add the numbers of rows to the features, where sentence-transformers cannot cut them.

        Args:
            features: What `preprocess` returned for n inputs; changed in place.
            contents: The inputs, with the images as the processor got them.

        Raises:
            Gen2EmbedError: The rows of a feature cannot be told apart by the sizes of the images.
        """
        names = image_features(features)
        if not names or _is_cut_by_the_library(features, names):
            return
        self._probe()
        counts = [self._count(tuple(image.size for image in content.images)) for content in contents]
        for name in names:
            rows = [1 if name in self._per_input else count.get(name, (0, 0))[0] for count in counts]
            axis = self._axes.get(name, 0)
            if sum(rows) != features[name].shape[axis]:
                processor = type(self._transformer.processor).__name__
                raise Gen2EmbedError(
                    f"{processor} gives {name} {features[name].shape[axis]} rows for a batch, but {sum(rows)} for its "
                    "inputs one by one: this model cannot be fine-tuned on images with a cached loss; train on texts "
                    "alone"
                )
            features[name + NUM_ROWS] = torch.tensor(rows, dtype=torch.long)
            if axis:
                features[name + AXIS] = torch.full((len(rows),), axis)
            if name in self._indices:
                spans = torch.tensor([count.get(name, (0, 0))[1] for count in counts], dtype=torch.long)
                features[name + FIRST_INDEX] = spans.cumsum(dim=0) - spans

    def _probe(self) -> None:
        """Find out about each feature: one row per input or not, along which axis, and whether it holds indices."""
        if self._probed:
            return
        one = Content("a", (Image.new("RGB", (64, 64)),))
        alone, features = self._processed([one]), self._processed([one, one, Content("a"), Content("a"), Content("a")])
        names = image_features(features)
        self._per_input = frozenset(name for name in names if len(features[name]) == 5)
        for name in names:
            sizes = zip(alone[name].shape, features[name].shape, strict=True)
            self._axes[name] = next((axis for axis, (one, two) in enumerate(sizes) if one != two), 0)
        self._indices = frozenset(name for name in names if name not in self._per_input and _shift(features[name]))
        self._probed = True

    def _count(self, sizes: tuple[Size, ...]) -> dict[str, tuple[int, int]]:
        """Return for each feature how many rows images of these sizes have, and how many indices they use."""
        if not sizes:
            return {}
        if sizes not in self._counted:
            content = Content("", tuple(Image.new("RGB", size) for size in sizes))
            # The second of two equal inputs tells by how much indices are shifted.
            copies = 2 if self._indices else 1
            features = self._processed([content] * copies)
            self._counted[sizes] = {
                name: (
                    features[name].shape[self._axes.get(name, 0)] // copies,
                    _shift(features[name]) if name in self._indices else 0,
                )
                for name in image_features(features)
            }
        return self._counted[sizes]

    def _processed(self, contents: list[Content]) -> dict[str, Any]:
        options = {"text": {"truncation": False}}
        messages = [content.as_messages() for content in contents]
        return dict(self._transformer.preprocess(messages, processing_kwargs=options))


def _shift(values: Tensor) -> int:
    """Return by how much the second half of an integer tensor is above the first; 0 if not by one number everywhere.

    Negative integers stand for no index, and are left out.
    """
    if values.is_floating_point() or len(values) % 2:
        return 0
    first, second = values.chunk(2)
    differences = (second - first)[first >= 0].unique()
    return int(differences[0]) if len(differences) == 1 and bool((first < 0).eq(second < 0).all()) else 0


def image_features(features: dict[str, Any]) -> list[str]:
    """Return the names of the features that hold images: all tensors but those of the tokens, and numbers of rows.

    Args:
        features: What `preprocess` returned.
    """
    tokens = features["input_ids"].shape
    return [
        name
        for name, value in features.items()
        if isinstance(value, Tensor) and value.shape != tokens and name != _COUNT and not _is_ours(name)
    ]


def _is_cut_by_the_library(features: dict[str, Any], names: list[str]) -> bool:
    if set(names) == _PER_PATCH:
        return True
    return set(names) <= _PER_IMAGE and all(len(features[name]) == int(features[_COUNT].sum()) for name in names)


def minibatch(features: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Return the features of the inputs `begin` to `end`.

    Args:
        features: The features of n inputs, with the numbers of rows that `ImageRows.add` added, if any.
        begin: The first input.
        end: The input behind the last one.

    Returns:
        New features, without padding that none of the inputs needs; without image features if no input has an image.
    """
    counts = {name.removesuffix(NUM_ROWS): rows for name, rows in features.items() if name.endswith(NUM_ROWS)}
    others = {name: value for name, value in features.items() if name not in counts and not _is_ours(name)}
    cut: dict[str, Any] = _create_minibatch(others, begin, end)
    if counts and int(features[_COUNT][begin:end].sum()):
        for name, rows in counts.items():
            first = int(rows[:begin].sum())
            axis = int(features[name + AXIS][0]) if name + AXIS in features else 0
            cut[name] = features[name].narrow(axis, first, int(rows[begin:end].sum()))
            if name + FIRST_INDEX in features:
                lowest = features[name + FIRST_INDEX][begin]
                cut[name] = torch.where(cut[name] < 0, cut[name], cut[name] - lowest)
    return cut


def _is_ours(name: str) -> bool:
    return name.endswith((NUM_ROWS, FIRST_INDEX, AXIS))


@torch.inference_mode()
def check_minibatches(model: Gen2Embed, read: Callable[[list[Any]], dict[str, Any]]) -> None:
    """Check that inputs of a batch with images have the same vectors when each is cut out of the batch.

    A cached loss cuts batches into mini-batches; a model that gives other vectors then would be trained wrongly. Cost:
    six short inputs.

    Args:
        model: The model, where it will be trained.
        read: Makes features of inputs.

    Raises:
        Gen2EmbedError: The model raises an error for a mini-batch, or its vectors differ.
    """
    wide, square = (Image.effect_noise(size, 64).convert("RGB") for size in ((200, 60), (64, 64)))
    cells = [{"text": "a text"}, {"text": "with an image", "image": wide}, {"image": square}]
    was_training = model.training
    model.eval()
    try:
        features = {
            name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in read(cells).items()
        }
        whole = model(dict(features))["sentence_embedding"]
        cut = [model(minibatch(features, row, row + 1))["sentence_embedding"] for row in range(len(cells))]
    except Gen2EmbedError:
        raise
    except Exception as error:  # whatever a model or its processor raises
        raise Gen2EmbedError(f"{_refusal(model)}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        model.train(was_training)
    difference = float((torch.cat(cut) - whole).float().norm(dim=1).max())
    if not difference < (_ROUNDING if whole.dtype == torch.float32 else _COARSE):
        raise Gen2EmbedError(f"{_refusal(model)}: the vectors of a mini-batch differ by {difference:.2g}")


def _refusal(model: Gen2Embed) -> str:
    return (
        f"{type(model[0].model).__name__} cannot be fine-tuned on images with a cached loss, which cuts batches into "
        "mini-batches; train another model, or this one without SahaLoss"
    )
