"""The registry of readers, what they share, and the candidates of all rows together."""

from pathlib import Path

from datasets import Dataset, load_dataset

HUB_NAME = "ziyjiang/MMEB_Test_Instruct"
COLUMNS = ["query_text", "query_image", "cand_text", "cand_image", "dataset_infos"]
MARKER = "<|image_1|>"


class AutoEvalPairDataset:
    registry = {}  # noqa: RUF012  # as theirs

    @classmethod
    def instantiate(cls, dataset_parser, *args, **kwargs):
        return cls.registry[dataset_parser](*args, **kwargs)

    @classmethod
    def register(cls, dataset_name):
        def remember(reader):
            cls.registry[dataset_name] = reader
            return reader

        return remember


def read(data_prepare, model_args, **settings):
    """Rows of a dataset as `data_prepare`, which is given one row, turns them out."""
    dataset = load_dataset(HUB_NAME, settings["dataset_name"], split="test")
    settings["model_backbone"] = model_args.model_backbone
    rows = dataset.map(lambda row: data_prepare(row, **settings), num_proc=2, load_from_cache_file=False)
    return rows.select_columns(COLUMNS), None


def picture(image_root, path):
    return {"bytes": [None], "paths": [str(Path(image_root) / path)], "resolutions": [None]}


def generate_cand_dataset(dataset, corpus):
    rows = {}
    for row in dataset:
        names = row["dataset_infos"]["cand_names"]
        for text, image, name in zip(row["cand_text"], row["cand_image"], names, strict=True):
            infos = {"cand_name": name}
            rows.setdefault(name, {"cand_text": [text], "cand_image": [image], "dataset_infos": infos})
    return Dataset.from_list(list(rows.values()))
