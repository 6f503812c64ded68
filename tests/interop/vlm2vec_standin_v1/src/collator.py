"""From rows to a batch."""

from dataclasses import dataclass
from typing import Any

from src.model_utils import process_vlm_inputs_fns


@dataclass
class EvalCollator:
    data_args: Any
    model_args: Any
    processor: Any

    def __call__(self, examples):
        columns = {"text": [example[0] for example in examples], "image": [example[1] for example in examples]}
        process = process_vlm_inputs_fns[self.model_args.model_backbone]
        return process(columns, processor=self.processor, max_length=self.data_args.max_len)
