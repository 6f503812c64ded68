"""The command line."""

from dataclasses import dataclass, field

import transformers


@dataclass
class ModelArguments:
    model_name: str = field()
    model_type: str = field(default=None)
    processor_name: str = field(default=None)
    model_backbone: str = field(default=None)
    checkpoint_path: str = field(default=None)
    pooling: str = field(default="last")
    normalize: bool = field(default=False)
    temperature: float = field(default=0.02)
    lora: bool = field(default=False)


@dataclass
class DataArguments:
    dataset_config: str = field(default=None)
    data_basedir: str = field(default=None)
    encode_output_path: str = field(default=None)
    max_len: int = field(default=None)
    image_resolution: str = field(default=None)
    resize_min_pixels: int = field(default=28 * 28 * 4)
    resize_max_pixels: int = field(default=28 * 28 * 1280)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(default=None)
    project_name: str = field(default=None)
