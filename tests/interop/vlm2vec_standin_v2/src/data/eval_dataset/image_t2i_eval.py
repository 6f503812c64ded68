"""A text to an image."""

from src.data.eval_dataset.base_eval_dataset import MARKER, AutoEvalPairDataset, picture, read
from src.model.processor import VLM_IMAGE_TOKENS, process_input_text


def candidates(row, model_backbone, image_root, end):
    instruction = row["tgt_inst"].replace(MARKER, "")
    texts = [f"{instruction} {text}" for text in row["tgt_text"]]
    if not row["tgt_text"][0].strip():
        texts = [instruction] * len(texts)
    else:
        end = "\n"
    prompts = [process_input_text(text, model_backbone, add_image_token=True) for text in texts]
    return {
        "cand_text": [prompt.replace(" \n", "\n") + end for prompt in prompts],
        "cand_image": [picture(image_root, path) for path in row["tgt_img_path"]],
    }


def data_prepare(row, *, model_backbone, image_root, **_):
    instruction = row["qry_inst"].replace(MARKER, VLM_IMAGE_TOKENS[model_backbone])
    paths = row["tgt_img_path"]
    return {
        "query_text": [f"{instruction} {row['qry_text']}\n"],
        "query_image": [None],
        **candidates(row, model_backbone, image_root, "\n"),
        "dataset_infos": {"cand_names": paths, "label_name": paths[0]},
    }


@AutoEvalPairDataset.register("image_t2i")
def load_image_t2i_dataset(model_args, data_args, **kwargs):
    return read(data_prepare, model_args, **kwargs)
