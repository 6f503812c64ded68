"""The distinct inputs of one side of a dataset, in the order of a set."""

from pathlib import Path

import datasets
from PIL import Image
from src.model_utils import PHI3V, vlm_image_tokens
from torch.utils.data import Dataset

RESOLUTIONS = {"high": (1344, 1344), "mid": (672, 672), "low": (128, 128)}


class EvalDataset(Dataset):
    def __init__(self, data_args, model_args, subset, text_field, img_path_field):
        self.data_args = data_args
        self.model_args = model_args
        self.backbone = model_args.model_backbone
        self.eval_data = datasets.load_dataset(data_args.dataset_name, subset, split=data_args.dataset_split)
        self.paired_data = self.get_paired_data(text_field, img_path_field)
        columns = {key: [pair[key] for pair in self.paired_data] for key in ("text", "img_path")}
        self.paired_dataset = datasets.Dataset.from_dict(columns)

    def __len__(self):
        return len(self.paired_dataset)

    def __getitem__(self, item):
        row = self.paired_dataset[item]
        text = row["text"].replace(vlm_image_tokens[PHI3V], vlm_image_tokens[self.backbone])
        return text, self._get_image(row["img_path"])

    def _get_image(self, img_path):
        if not img_path:
            return None
        image = Image.open(Path(self.data_args.image_dir) / img_path)
        return image.resize(RESOLUTIONS[self.data_args.image_resolution])

    def get_paired_data(self, text_field, img_path_field):
        distinct = set()
        for row in self.eval_data:
            texts, paths = row[text_field], row[img_path_field]
            if isinstance(texts, str):
                texts, paths = [texts], [paths]
            distinct.update(zip(texts, paths, strict=True))
        return [{"text": text, "img_path": path} for text, path in distinct]
