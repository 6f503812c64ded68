"""A question about an image."""

from src.data.eval_dataset.base_eval_dataset import AutoEvalPairDataset, read
from src.data.eval_dataset.image_cls_dataset import data_prepare


@AutoEvalPairDataset.register("image_qa")
def load_image_qa_dataset(model_args, data_args, **kwargs):
    return read(data_prepare, model_args, strip=True, **kwargs)
