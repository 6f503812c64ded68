"""`Phi3VProcessor`: text with marks of images (`<|image_1|>`, `<|image_2|>`, …) to tokens, as the published code does.

A text with images is tokenized in pieces, between the marks, and each piece begins with `<s>`: so the models were
trained. A text without images is tokenized as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.image_processing_base import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from gen2embed_mteb.embedder.families.phi3v.image_processing import Phi3VImageProcessor, num_image_tokens
from gen2embed_mteb.errors import Gen2EmbedError

IMAGE_PLACEHOLDER = "<|image|>"
"""The token that stands where an embedding of an image goes."""
_MARK = re.compile(r"<\|image_(\d+)\|>")
_PROBE = ("<|user|>\n", [1, 32010, 29871, 13])


class Phi3VProcessor(ProcessorMixin):
    """Image processor and tokenizer of Phi-3.5-V.

    Args:
        image_processor: Cuts images.
        tokenizer: The tokenizer of `tokenizer.json`, exactly as that file says.
        chat_template: A Jinja template.
        kwargs: Settings of the published files.
    """

    def __init__(
        self,
        image_processor: Phi3VImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        chat_template: Any = None,
        **kwargs: Any,
    ) -> None:
        """Keep the parts.

        Raises:
            Gen2EmbedError: The tokenizer was read by a class that changes its tokens, or is another model's.
        """
        self.image_token = IMAGE_PLACEHOLDER
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        text, ids = _PROBE
        found = list(tokenizer(text)["input_ids"])
        if found != ids:
            raise Gen2EmbedError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: {text!r} becomes {found}, which must be {ids}: it is "
                "not the tokenizer of Phi-3.5-V, or tokenizer.json was changed; copy or download the folder again"
            )

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """Read `tokenizer.json` as it is; the class that AutoTokenizer would take writes other tokens."""
        options = {name: value for name, value in kwargs.items() if name not in ("num_crops", "use_fast")}
        return PreTrainedTokenizerFast.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Load both parts by their own classes, so that no code of the folder is asked for."""
        kwargs.pop("subfolder", None)
        images = {name: value for name, value in kwargs.items() if not name.endswith("_token") and name != "use_fast"}
        return [
            Phi3VImageProcessor.from_pretrained(pretrained_model_name_or_path, **images),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
        ]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenize texts, with their images.

        Args:
            images: An image, the images of all texts in order, or a list of them per text.
            text: A text, or n texts, in which image k of a text is marked by `<|image_k|>`.
            kwargs: Options of the tokenizer (`padding`, `padding_side`, `return_tensors`) and of the image processor
                (`num_crops`), plain or in `text_kwargs` and `images_kwargs`.

        Returns:
            `input_ids` and `attention_mask` (n, length), with the image token where embeddings go; with images also
            `pixel_values` and `image_sizes` (see `Phi3VImageProcessor`).

        Raises:
            Gen2EmbedError: The marks of a text are not those of its images.
        """
        options = {**kwargs, **kwargs.pop("text_kwargs", {}), **kwargs.pop("common_kwargs", {})}
        of_images = {**options.pop("images_kwargs", {})}
        if "num_crops" in options:
            of_images["num_crops"] = options.pop("num_crops")
        tensors, padding = options.pop("return_tensors", None), options.pop("padding", False)
        texts = [text] if isinstance(text, str) else list(text)
        own = _per_text(images, texts)
        flat = [image for row in own for image in row]
        features = self.image_processor(flat, **of_images) if flat else {}
        counts = features.pop("num_img_tokens", [])
        plain = {name: value for name, value in options.items() if name in _OF_TOKENIZER}
        rows: list[list[int]] = []
        order: list[int] = []
        start = 0
        for one, row in zip(texts, own, strict=True):
            ids, numbers = self._token_ids(one, counts[start : start + len(row)], plain)
            rows.append(ids)
            order += [start + number - 1 for number in numbers]
            start += len(row)
        features = {name: value[order] for name, value in features.items()}  # in the order of the marks
        side = options.get("padding_side")
        padded = self.tokenizer.pad({"input_ids": rows}, padding=padding, padding_side=side)
        batch = {name: torch.tensor(padded[name]) if tensors else padded[name] for name in padded}
        return BatchFeature(data={**batch, **features})

    def _token_ids(self, text: str, counts: list[int], options: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, with `counts[k - 1]` image tokens in the place of mark k; and the marks."""
        if not counts:
            return list(self.tokenizer(text, **options)["input_ids"]), []
        pieces = _MARK.split(text)  # text, number, text, number, …, text
        numbers = [int(number) for number in pieces[1::2]]
        if sorted(set(numbers)) != list(range(1, len(counts) + 1)):
            marks = ", ".join(f"<|image_{number}|>" for number in numbers) or "none"
            raise Gen2EmbedError(
                f"the text has {len(counts)} image(s), and the marks {marks}; each image needs its mark, "
                "numbered from 1 without gaps"
            )
        ids: list[int] = []
        for index, piece in enumerate(self.tokenizer(pieces[::2], **options)["input_ids"]):
            ids += piece
            if index < len(numbers):
                ids += [self.image_token_id] * counts[numbers[index] - 1]
        return ids, numbers

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Return how many tokens images of these (height, width) become."""
        most = kwargs.get("num_crops") or self.image_processor.num_crops
        counts = [num_image_tokens((width, height), most) for height, width in image_sizes or ()]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    @property
    def model_input_names(self) -> list[str]:
        """The names of the features."""
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]


_OF_TOKENIZER = frozenset({"add_special_tokens", "truncation", "max_length", "split_special_tokens"})


def _per_text(images: Any, texts: list[str]) -> list[list[Any]]:
    """Return the images of each text."""
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if images and all(isinstance(row, (list, tuple)) for row in images):
        return [list(row) for row in images]
    rest = iter(images)
    own = [[next(rest, None) for _ in {*_MARK.findall(text)}] for text in texts]
    left = len(list(rest))
    if left or any(image is None for row in own for image in row):
        due = sum(map(len, own))
        raise Gen2EmbedError(f"{len(images)} images, but the texts have marks of {due}; mark each image: <|image_1|>")
    return own
