"""From rows to a batch."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from qwen_vl_utils import smart_resize  # noqa: F401

from src.model.processor import process_vlm_inputs_fns


@dataclass
class MultimodalEvalDataCollator:
    processor: Any
    model_args: Any
    data_args: Any
    encode_side: str

    def __call__(self, examples):
        kind = "query" if self.encode_side == "qry" else "cand"
        texts = [text for example in examples for text in example[f"{kind}_text"]]
        images = [
            [Image.open(path) for path in image["paths"]] if image else None
            for example in examples
            for image in example[f"{kind}_image"]
        ]
        process = process_vlm_inputs_fns[self.model_args.model_backbone]
        inputs = process({"text": texts, "images": images}, processor=self.processor, max_length=self.data_args.max_len)
        return inputs, [example["dataset_infos"] for example in examples]
