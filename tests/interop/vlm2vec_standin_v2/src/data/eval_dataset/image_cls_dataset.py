"""An image to one of a few labels."""

from src.data.eval_dataset.base_eval_dataset import MARKER, AutoEvalPairDataset, picture, read
from src.model.processor import process_input_text


def data_prepare(row, *, model_backbone, image_root, strip=False, **_):
    instruction = row["qry_inst"].replace(MARKER, "")
    if strip:
        instruction = "\n" + instruction.strip()
    text = process_input_text(instruction, model_backbone, text=row["qry_text"], add_image_token=True)
    return {
        "query_text": [text.replace(" \n", "\n") + "\n"],
        "query_image": [picture(image_root, row["qry_img_path"])],
        "cand_text": row["tgt_text"],
        "cand_image": [None] * len(row["tgt_text"]),
        "dataset_infos": {"cand_names": row["tgt_text"], "label_name": row["tgt_text"][0]},
    }


@AutoEvalPairDataset.register("image_cls")
def load_image_cls_dataset(model_args, data_args, **kwargs):
    return read(data_prepare, model_args, **kwargs)
