"""Every reader, registered by being imported."""

from .image_cls_dataset import load_image_cls_dataset
from .image_i2i_vg_dataset import load_image_i2i_vg_dataset
from .image_qa_dataset import load_image_qa_dataset
from .image_t2i_eval import load_image_t2i_dataset
from .video_dataset import load_video_dataset

__all__ = [
    "load_image_cls_dataset",
    "load_image_i2i_vg_dataset",
    "load_image_qa_dataset",
    "load_image_t2i_dataset",
    "load_video_dataset",
]
