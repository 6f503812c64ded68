"""`Phi3VImageProcessor`: crops of an image, with Pillow and torch alone, to the last bit those of the published code.

The published code resizes with Pillow too, and its pixels are those of torchvision's `ToTensor` and `Normalize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from gen2embed_mteb.errors import Gen2EmbedError

SIDE = 336
"""The side of a crop, in pixels."""
GRID = 12
"""The side of the grid of embeddings that a crop becomes."""
NUM_CROPS = 4
"""The most tiles of an image, by default: what the published checkpoint says."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def tiled_size(size: tuple[int, int], num_crops: int) -> tuple[int, int, int]:
    """Return the size to which an image is resized, and the height to which it is then padded.

    Args:
        size: Width and height in pixels, the width not less than the height.
        num_crops: The most tiles.

    Returns:
        Width, height, and the height filled up to whole tiles.

    Raises:
        Gen2EmbedError: The image is so narrow that no row of pixels would be left.
    """
    ratio = size[0] / size[1]
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= num_crops:
        columns += 1
    width = columns * SIDE
    height = int(width / ratio)  # in floats, as in the published code: integers differ by a pixel now and then
    if height == 0:
        raise Gen2EmbedError(
            f"an image whose sides differ by {ratio:.0f} to 1 has no pixels left in {columns} tile(s) of {SIDE}x{SIDE}"
        )
    return width, height, math.ceil(height / SIDE) * SIDE


def num_image_tokens(size: tuple[int, int], num_crops: int) -> int:
    """Return how many tokens an image becomes.

    Args:
        size: Width and height in pixels.
        num_crops: The most tiles.

    Raises:
        Gen2EmbedError: See `tiled_size`.
    """
    width, _, height = tiled_size((max(size), min(size)), num_crops)
    columns, rows = width // SIDE, height // SIDE
    if size[0] < size[1]:
        rows, columns = columns, rows
    return GRID**2 * (rows * columns + 1) + 1 + GRID * (rows + 1)


class Phi3VImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """The settings that this image processor has beside those of others."""

    num_crops: int
    num_img_tokens: int


class Phi3VImageProcessor(BaseImageProcessor):
    """Cuts images into a global view and tiles.

    Args:
        num_crops: The most tiles of an image: 4 is the checkpoint's default; 16 is advised for single pictures.
        image_mean: The mean of the red, green and blue channel.
        image_std: Their standard deviation.
        num_img_tokens: Tokens of a crop; only 144 is known.
        do_convert_rgb: Kept for the published files; images are always converted.
        kwargs: Other settings of the published files.

    Raises:
        Gen2EmbedError: `num_crops` is not positive, or `num_img_tokens` is not 144.
    """

    valid_kwargs = Phi3VImagesKwargs
    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012 (as in transformers)

    def __init__(
        self,
        num_crops: int = NUM_CROPS,
        image_mean: Sequence[float] = _MEAN,
        image_std: Sequence[float] = _STD,
        num_img_tokens: int = GRID**2,
        do_convert_rgb: bool = True,
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        for name in ("use_fast", "backend"):  # Pillow resizes whatever they say
            kwargs.pop(name, None)
        super().__init__(**kwargs)
        self.num_crops = num_crops
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.num_img_tokens, self.do_convert_rgb = num_img_tokens, do_convert_rgb
        _check_num_crops(num_crops)
        if num_img_tokens != GRID**2:
            raise Gen2EmbedError(f"num_img_tokens is {num_img_tokens!r}; only {GRID**2} is known, that of Phi-3.5-V")

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Cut images; see `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self, images: Any, num_crops: int | None = None, return_tensors: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Cut images.

        Args:
            images: An image of Pillow, or a list.
            num_crops: Instead of the setting.
            return_tensors: Tensors of torch are returned in any case.
            kwargs: Options of other image processors, which do not concern this one.

        Returns:
            `pixel_values` (n, num_crops + 1, 3, 336, 336) float32: the global view, the tiles row by row, zeros;
            `image_sizes` (n, 2) int64, height and width of the tiles together; `num_img_tokens`, n numbers.

        Raises:
            Gen2EmbedError: See `tiled_size`.
        """
        most = self.num_crops if num_crops is None else num_crops
        _check_num_crops(most)
        flat = make_flat_list_of_images(images)
        crops = [self._crops(image, most) for image in flat]
        data = {
            "pixel_values": torch.stack([pixels for pixels, _ in crops]),
            "image_sizes": torch.tensor([size for _, size in crops], dtype=torch.int64),
            "num_img_tokens": [num_image_tokens(image.size, most) for image in flat],
        }
        return BatchFeature(data=data)

    def _crops(self, image: Image.Image, most: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return (most + 1, 3, 336, 336) float32, and height and width of the tiles together."""
        pixels = self._normalized(_padded(image.convert("RGB"), most))
        _, height, width = pixels.shape
        view = functional.interpolate(pixels[None], size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        tiles = pixels.reshape(3, height // SIDE, SIDE, width // SIDE, SIDE).permute(1, 3, 0, 2, 4).flatten(0, 1)
        crops = torch.zeros((most + 1, 3, SIDE, SIDE))
        crops[0], crops[1 : len(tiles) + 1] = view[0], tiles
        return crops, (height, width)

    def _normalized(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return pixels.sub_(mean).div_(std)


def _padded(image: Image.Image, num_crops: int) -> Image.Image:
    """Resize an image, and fill it up with white above and below; a high one is transposed for that."""
    is_high = image.width < image.height
    if is_high:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    width, height, whole = tiled_size(image.size, num_crops)
    canvas = Image.new("RGB", (width, whole), "white")
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, (whole - height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if is_high else canvas


def _check_num_crops(num_crops: Any) -> None:
    if isinstance(num_crops, bool) or not isinstance(num_crops, int) or num_crops < 1:
        raise Gen2EmbedError(f"num_crops is {num_crops!r}; it must be a positive integer: 4, or 16 for single pictures")
