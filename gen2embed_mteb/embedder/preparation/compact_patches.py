"""Patches of images as bytes, for the processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: exact, in an eighth of the size

transformers' processor resizes an image in bytes, and then rescales, normalises and repeats every pixel in floating
point. What becomes of a byte depends on the byte and its channel alone. So a worker cuts the resized bytes into
patches, and the 256 values of each channel are looked up where the model runs: the same numbers to the bit.

That they are the same is checked at the start on a picture of noise, against the processor itself.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

logger = logging.getLogger(__name__)

PIXELS = "pixel_values"
_PROCESSOR = "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil"
_PROBE = (150, 130)


class CompactPatches:
    """The compact form of a processor's patches.

    Args:
        values: (3, 256) float32, what the processor makes of each byte of each channel.
        repeats: How often the processor repeats a patch, as if it were so many frames.
    """

    def __init__(self, values: torch.Tensor, repeats: int) -> None:
        """Keep both."""
        self._values, self._repeats = values, repeats

    @classmethod
    def of(cls, processor: Any) -> CompactPatches | None:
        """Return the compact form for an image processor; `None` if it is of another kind, or the check fails."""
        kind = type(processor)
        if f"{kind.__module__}.{kind.__name__}" != _PROCESSOR:
            return None
        if not (processor.do_resize and processor.do_rescale and processor.do_normalize):
            return None
        levels = np.repeat(np.arange(256, dtype=np.uint8)[None, None], 3, axis=0)
        scaled = processor.rescale(levels, processor.rescale_factor)
        values = processor.normalize(scaled, processor.image_mean, processor.image_std)[:, 0].astype(np.float32)
        found = cls(torch.from_numpy(values), processor.temporal_patch_size)
        if found._is_exact(processor):
            return found
        logger.warning("%s: its patches cannot be made of bytes; workers return them as it does", kind.__name__)
        return None

    def install(self, processor: Any) -> None:
        """Let an image processor return compact patches from now on."""
        vars(processor).update(process_image=_as_picture, _preprocess=_preprocess)

    def expanded(self, patches: torch.Tensor) -> torch.Tensor:
        """Return patches as the processor itself returns them.

        Args:
            patches: (n, side, side, 3) uint8, on any device.

        Returns:
            (n, 3 · repeats · side · side) float32, on the same device.
        """
        if patches.device.type == "cpu":
            return self._expanded_on_cpu(patches.numpy())
        return self._expanded_by_torch(patches)

    def _expanded_by_torch(self, patches: torch.Tensor) -> torch.Tensor:
        values = self._values.to(patches.device)
        channels = torch.arange(3, device=patches.device)[:, None, None]
        looked_up = values[channels, patches.permute(0, 3, 1, 2).long()]
        return looked_up[:, :, None].expand(-1, -1, self._repeats, -1, -1).reshape(len(patches), -1)

    def _expanded_on_cpu(self, patches: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Do the same with numpy, which looks values up in a third of the time."""
        number, height, width, channels = patches.shape
        expanded = np.empty((number, channels, self._repeats, height, width), np.float32)
        for channel, values in enumerate(self._values.numpy()):
            expanded[:, channel] = np.take(values, patches[..., channel])[:, None]
        return torch.from_numpy(expanded.reshape(number, -1))

    def _is_exact(self, processor: Any) -> bool:
        noise = np.random.default_rng(0).integers(0, 256, (_PROBE[1], _PROBE[0], 3), dtype=np.uint8)
        pictures = [Image.fromarray(noise), Image.fromarray(noise[:64, :, ::-1].copy())]
        try:
            expected = processor(pictures, return_tensors="pt")
            own = type(processor)(**processor.to_dict())
            self.install(own)
            found = own(pictures, return_tensors="pt")
            same = torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
            return same and torch.equal(self.expanded(found[PIXELS]), expected[PIXELS])
        except Exception:  # another version of transformers may do anything
            return False


def _as_picture(image: Image.Image, **_: Any) -> Image.Image:
    """Return an image as it is, in place of an array that would only become an image again."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(image).__name__}")
    return image if image.mode == "RGB" else image.convert("RGB")


def _preprocess(
    images: list[Image.Image],
    *,
    size: Any,
    resample: Any,
    patch_size: int,
    merge_size: int,
    return_tensors: Any,
    **_: Any,
) -> Any:
    """Do what `Qwen2VLImageProcessorPil._preprocess` does, but for what is done to single pixels."""
    from transformers import BatchFeature
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sizes = [
        smart_resize(picture.height, picture.width, patch_size * merge_size, size.shortest_edge, size.longest_edge)
        for picture in images
    ]
    grids = [[1, height // patch_size, width // patch_size] for height, width in sizes]
    # The three channels of a pixel stay side by side, so that whole rows of a patch are copied; and only once.
    patches = np.empty((sum(rows * columns for _, rows, columns in grids), patch_size, patch_size, 3), np.uint8)
    start = 0
    for picture, (height, width), (_, rows, columns) in zip(images, sizes, grids, strict=True):
        resized = picture if picture.size == (width, height) else picture.resize((width, height), resample)
        blocks = np.asarray(resized).reshape(
            rows // merge_size, merge_size, patch_size, columns // merge_size, merge_size, patch_size, 3
        )
        ordered = blocks.transpose(0, 3, 1, 4, 2, 5, 6)
        own = patches[start : start + rows * columns]
        own.reshape(ordered.shape)[...] = ordered
        start += rows * columns
    data: dict[str, Any] = {PIXELS: patches, "image_grid_thw": np.array(grids, dtype=np.int64)}
    if return_tensors == "pt":
        data[PIXELS] = torch.from_numpy(patches)  # BatchFeature would copy it
    return BatchFeature(data=data, tensor_type=return_tensors)
