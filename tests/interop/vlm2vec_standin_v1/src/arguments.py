"""The command line."""

from dataclasses import dataclass, field

import transformers


@dataclass
class ModelArguments:
    model_name: str = field()
    model_backbone: str = field(default=None)
    processor_name: str = field(default=None)
    checkpoint_path: str = field(default=None)
    pooling: str = field(default="last")
    normalize: bool = field(default=False)
    temperature: float = field(default=0.02)
    lora: bool = field(default=False)
    num_crops: int = field(default=16)


@dataclass
class DataArguments:
    dataset_name: str = field(default=None)
    subset_name: list[str] = field(default=None)
    dataset_split: str = field(default="train")
    image_dir: str = field(default=None)
    encode_output_path: str = field(default=None)
    max_len: int = field(default=None)
    image_resolution: str = field(default="high")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default=None)
    project_name: str = field(default=None)
