"""An image to an image, grounding among them."""

from src.data.eval_dataset import image_cls_dataset
from src.data.eval_dataset.base_eval_dataset import AutoEvalPairDataset, read
from src.data.eval_dataset.image_t2i_eval import candidates

QUOTE = '"'


def data_prepare(row, *, model_backbone, image_root, **_):
    shared = {"model_backbone": model_backbone, "image_root": image_root}
    names = [f"{path}:{text.strip(QUOTE)}" for path, text in zip(row["tgt_img_path"], row["tgt_text"], strict=True)]
    return {
        **image_cls_dataset.data_prepare(row, strip=True, **shared),
        **candidates(row, end="", **shared),
        "dataset_infos": {"cand_names": names, "label_name": names[0]},
    }


@AutoEvalPairDataset.register("image_i2i_vg")
def load_image_i2i_vg_dataset(model_args, data_args, **kwargs):
    return read(data_prepare, model_args, **kwargs)
