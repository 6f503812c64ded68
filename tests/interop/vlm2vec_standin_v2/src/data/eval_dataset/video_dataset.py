"""Video, which needs packages that may be absent."""

import decord

from src.data.eval_dataset.base_eval_dataset import AutoEvalPairDataset
from src.utils.vision_utils import Frames


@AutoEvalPairDataset.register("video")
def load_video_dataset(model_args, data_args, **kwargs):
    return Frames(decord.VideoReader(kwargs["clip_root"])), None
