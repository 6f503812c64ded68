"""Train `gen2embed-mini` from scratch by next-token prediction, and write it in the hub's layout.

    python -m gen2embed_mteb.mini.pretrain --output_dir gen2embed_mteb/mini/model

The loss is only the cross-entropy of the assistant's next token: there is no contrastive term and no pooling, and no
embedding is trained. The last state nevertheless embeds well under the two-level prompt, which is the effect that the
paper describes (Sec. III-B).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from gen2embed_mteb.mini.corpus import (
    Album,
    Conversation,
    conversation,
    first_lesson,
    question_lesson,
    reading_lesson,
    shape_lesson,
)
from gen2embed_mteb.mini.digits import train_digits
from gen2embed_mteb.mini.world import SIDE
from gen2embed_mteb.storage.developer_files import write_json

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 8, 2
NUM_IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Round:
    """A part of training with its own optimizer.

    Attributes:
        lessons: (lesson, steps) in order; steps are multiples of 8.
        batch_size: The number of conversations per step.
        learning_rate: The peak of the learning rate, after `warmup_steps`.
        horizon: The steps over which the learning rate falls as a cosine; longer than the round if it ends early.
        rope_theta: The base of the text model's rotary positions. M-RoPE encodes height and width in its lower
            frequencies: with a small base, the model soon distinguishes places on the 4 x 4 grid of image tokens; with
            a large base, it finds a word at any place of a long prompt.
    """

    lessons: tuple[tuple[str, int], ...]
    batch_size: int
    learning_rate: float
    horizon: int
    rope_theta: float
    warmup_steps: int = 150


ROUNDS = (
    Round((("first_lesson", 1200), ("conversation", 800)), 48, 1.2e-3, 5200, 8.0),
    Round((("reading_lesson", 4000),), 32, 1.2e-3, 4000, 100.0),
    Round((("shape_lesson", 1600), ("reading_lesson", 400)), 32, 1.2e-3, 2000, 100.0),
    Round((("question_lesson", 3600), ("reading_lesson", 400)), 32, 1.2e-3, 4000, 100.0),
)
"""The order of training: images, then reading, then shapes, then questions followed by a request for one word."""

LESSONS = {
    "first_lesson": first_lesson,
    "conversation": conversation,
    "reading_lesson": reading_lesson,
    "shape_lesson": shape_lesson,
    "question_lesson": question_lesson,
}


@dataclass(frozen=True)
class PretrainConfig:
    """All settings that decide the weights; versions of libraries decide them too."""

    seed: int = 0
    rounds: tuple[Round, ...] = ROUNDS
    num_pictures: int = 8000
    vocab_size: int = 1100
    hidden_size: int = 192
    num_layers: int = 4
    vision_size: int = 96
    vision_depth: int = 4
    initializer_range: float = 0.05


def build_tokenizer(texts: Iterator[str], vocab_size: int) -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer that is trained on the texts, with Qwen's pre-tokenizer and special tokens."""
    blank = Qwen2Tokenizer(vocab={}, merges=[])
    tokenizer = blank.train_new_from_iterator(
        texts, vocab_size=vocab_size, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Return Qwen2-VL's image processor for 8-pixel patches; it reduces images to at most 256 image tokens."""
    cell = (PATCH * MERGE) ** 2
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": 4 * cell, "longest_edge": 256 * cell},
    )


def build_model(config: PretrainConfig, tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """Return a Qwen2-VL with a few million random parameters."""
    token = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.hidden_size * 8 // 3,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rounds[0].rope_theta,
            "mrope_section": [config.hidden_size // 24] * 3,
        },
        "tie_word_embeddings": True,
        "initializer_range": config.initializer_range,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision_config = {
        "embed_dim": config.vision_size,
        "hidden_size": config.hidden_size,
        "depth": config.vision_depth,
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": config.initializer_range,
    }
    model_config = Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(model_config)


def render_prompt(example: Conversation) -> str:
    """Return the conversation up to the beginning of the assistant turn, with one token per patch of the image."""
    system = "" if example.system is None else f"<|im_start|>system\n{example.system}<|im_end|>\n"
    image = ""
    if example.pixels is not None:
        image = f"<|vision_start|>{'<|image_pad|>' * NUM_IMAGE_TOKENS}<|vision_end|>"
    return f"{system}<|im_start|>user\n{image}{example.user}<|im_end|>\n<|im_start|>assistant\n"


class Collator:
    """Converts conversations to model inputs, padded on the right, with labels only for the assistant's tokens."""

    def __init__(self, tokenizer: Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil) -> None:
        """Keep the tokenizer and the image processor; the patches of each image are computed once and kept."""
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._patches: dict[int, tuple[np.ndarray, torch.Tensor]] = {}

    def patches(self, pixels: np.ndarray) -> torch.Tensor:
        """Return the (64, 384) float32 patches of one image; the image is kept too, so that no other gets its id."""
        kept = self._patches.get(id(pixels))
        if kept is None:
            cut = self.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
            kept = self._patches[id(pixels)] = (pixels, cut.to(torch.bfloat16))
        return kept[1].float()

    def __call__(self, batch: list[Conversation]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask, labels, mm_token_type_ids, (n, length) int64, and the image features."""
        prompts = self.tokenizer([render_prompt(example) for example in batch])["input_ids"]
        answers = self.tokenizer([f"{example.answer}<|im_end|>\n" for example in batch])["input_ids"]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = torch.full((len(batch), length), self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = torch.tensor(prompt + answer)
            attention_mask[row, :end] = 1
            labels[row, len(prompt) : end - 1] = torch.tensor(answer[:-1])
        features = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        features["mm_token_type_ids"] = (input_ids == self.image_token).long()
        images = [self.patches(example.pixels) for example in batch if example.pixels is not None]
        if images:
            side = SIDE // PATCH
            features["pixel_values"] = torch.cat(images)
            features["image_grid_thw"] = torch.tensor([[1, side, side]] * len(images))
        return features


def training_text(config: PretrainConfig, num_examples: int) -> Iterator[str]:
    """Yield conversations of the mixture as plain text, on which the tokenizer is trained."""
    rng = np.random.default_rng((config.seed, 1))
    album = Album(rng, 64, train_digits())
    for _ in range(num_examples):
        example = conversation(rng, album)
        yield "\n".join(part for part in (example.system, example.user, example.answer) if part)


def train(config: PretrainConfig, output_dir: Path) -> None:
    """Run all rounds; after each, save model, tokenizer, processor and the training record in `output_dir`."""
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)
    tokenizer = build_tokenizer(training_text(config, 20_000), config.vocab_size)
    model = build_model(config, tokenizer)
    logger.info("%d parameters, %d tokens", sum(p.numel() for p in model.parameters()), len(tokenizer))
    collate = Collator(tokenizer, build_image_processor())
    started = time.monotonic()
    for number, (plan, batches) in enumerate(training_batches(config)):
        model = with_rope_theta(model, plan.rope_theta)
        loss = train_round(model, collate, batches, plan)
        save(model, tokenizer, collate.image_processor, output_dir)
        record = {
            "command": "python -m gen2embed_mteb.mini.pretrain --output_dir gen2embed_mteb/mini/model",
            "config": asdict(config),
            "rounds_done": number + 1,
            "loss_last_100": loss,
            "seconds": round(time.monotonic() - started),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        }
        write_json(output_dir / "pretrain.json", record)


def with_rope_theta(model: Qwen2VLForConditionalGeneration, theta: float) -> Qwen2VLForConditionalGeneration:
    """Return a model with the same weights and another rotary base, ready for training."""
    model.config.text_config.rope_parameters["rope_theta"] = theta
    rebuilt = Qwen2VLForConditionalGeneration(model.config)
    rebuilt.load_state_dict(model.state_dict())
    batch_vision_attention(rebuilt)
    return rebuilt.train()


def train_round(
    model: Qwen2VLForConditionalGeneration, collate: Collator, batches: Iterator[list[Conversation]], plan: Round
) -> float:
    """Run one round in place, and return the mean loss of its last 100 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, plan))
    started = time.monotonic()
    losses: list[float] = []
    steps = sum(count for _, count in plan.lessons)
    for step in tqdm(range(steps), unit="step", disable=not sys.stderr.isatty()):
        loss = next_token_loss(model, collate(next(batches)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            pace = (time.monotonic() - started) / (step + 1)
            logger.info("step %d of %d, loss %.3f, %.2f s/step", step + 1, steps, np.mean(losses[-100:]), pace)
    return float(np.mean(losses[-100:]))


def next_token_loss(model: Qwen2VLForConditionalGeneration, features: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cross-entropy of the labelled tokens; logits are computed only where there is a label."""
    targets = features["labels"][:, 1:]
    inputs = {name: value for name, value in features.items() if name != "labels"}
    states = model.model(**inputs).last_hidden_state[:, :-1]
    labelled = targets != -100
    return torch.nn.functional.cross_entropy(model.lm_head(states[labelled]), targets[labelled])


def batch_vision_attention(model: Qwen2VLForConditionalGeneration) -> None:
    """Let the vision tower compute attention for all images of a batch at once.

    transformers loops over images, as they may differ in size; here all have the same size, and the loop would take a
    third of the time. The weights and the result are the same.
    """

    def forward(
        self: torch.nn.Module,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: Any,
    ) -> torch.Tensor:
        count = len(cu_seqlens) - 1
        query, key, value = self.qkv(hidden_states).reshape(len(hidden_states), 3, self.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return self.proj(attended.transpose(1, 2).reshape(len(hidden_states), -1))

    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(forward, block.attn)


def training_batches(config: PretrainConfig) -> Iterator[tuple[Round, Iterator[list[Conversation]]]]:
    """Yield the rounds, each with its batches: exactly the data on which the model is trained, in order."""
    rng = np.random.default_rng((config.seed, 2))
    album = Album(rng, config.num_pictures, train_digits())
    for number, plan in enumerate(config.rounds):
        if number:
            rng = np.random.default_rng((config.seed, 2, number))
        yield plan, _batches(rng, album, plan)


def _batches(rng: np.random.Generator, album: Album, plan: Round) -> Iterator[list[Conversation]]:
    """Yield batches of similar length, which need little padding; each group of 8 batches is in random order."""
    for lesson, steps in plan.lessons:
        for _ in range(-(-steps // 8)):
            examples = [LESSONS[lesson](rng, album) for _ in range(8 * plan.batch_size)]
            examples.sort(key=lambda example: len(render_prompt(example)))
            for index in rng.permutation(8):
                yield examples[index * plan.batch_size : (index + 1) * plan.batch_size]


def _learning_rate(step: int, plan: Round) -> float:
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.horizon)))


def save(
    model: Qwen2VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    image_processor: Qwen2VLImageProcessorPil,
    output_dir: Path,
) -> None:
    """Write the model in the hub's layout: configurations, weights, tokenizer and chat template."""
    output_dir.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(eos_token_id=model.config.text_config.eos_token_id, do_sample=False)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    settings: dict[str, Any] = image_processor.to_dict()
    settings.update(image_processor_type="Qwen2VLImageProcessor", processor_class="Qwen2VLProcessor")
    (output_dir / "preprocessor_config.json").write_bytes(
        (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line, whose flags name the output folder and the seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(PretrainConfig(seed=arguments.seed), arguments.output_dir)


if __name__ == "__main__":
    main()
