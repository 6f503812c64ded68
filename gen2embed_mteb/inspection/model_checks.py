"""`gen2embed doctor MODEL`: checks a model on its real weights before anything is measured with it.

Each check states a fact that every model must keep: a vector must not depend on what else is in its batch, for example.
They run in float32, where rounding is far below what a fault makes; the last one converts the model to bfloat16.

Cost: the model is loaded in float32 (4 bytes a parameter), and runs about sixty short inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

ROUNDING = 1e-3
"""The largest difference of two unit vectors that counts as rounding in float32."""
DIFFERENT = 1e-2
"""The least difference of the vectors of two inputs that have nothing in common."""
LEAST_COSINE = 0.98
"""The least cosine of a vector in bfloat16 with the same one in float32."""

SIDES: tuple[Side, Side] = ("query", "document")
_Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: The fact that is checked.
        passed: Whether it holds.
        found: What was measured.
        remedy: What the user can do if it does not hold.
    """

    name: str
    passed: bool
    found: str
    remedy: str


def check_model(model: Gen2Embed) -> list[Check]:
    """Run all checks.

    Args:
        model: The model, in float32. It is in bfloat16 afterwards.

    Returns:
        One result per check, in the order in which they ran. A check that cannot run because something is raised has
        not passed.
    """
    samples = _samples(model)
    single = {side: _encoded(model, side, samples, batch_size=1) for side in SIDES}
    checks: list[tuple[str, Callable[[], tuple[bool, str]], str]] = [
        (
            "vectors are finite",
            lambda: _finite(single),
            "copy or download the weights again; never load a model in float16 that was trained in bfloat16",
        ),
        (
            "other inputs have other vectors",
            lambda: _apart([vectors[:2] for vectors in single.values()]),
            "the weights do not belong to this model: copy or download them again",
        ),
        (
            "queries differ from documents",
            lambda: _sides_differ(model, single),
            "the template drops the prompt: look at gen2embed inspect-prompt, or use another model",
        ),
        (
            "the last token is the prompt's",
            lambda: _last_tokens(model, samples),
            "look at gen2embed inspect-prompt; a larger max_length, or another model",
        ),
        (
            "lengths are counted",
            lambda: _lengths(model, samples),
            "pass no max_length: inputs cannot be cut reliably",
        ),
        (
            "a batch gives the vectors of single inputs",
            lambda: _close(single, {side: _encoded(model, side, samples, batch_size=64) for side in SIDES}),
            'use batches of one input, or try model_kwargs={"attn_implementation": "eager"}',
        ),
        (
            "padding on either side gives the same",
            lambda: _padding(model, samples),
            "leave the tokenizer's padding_side as it is",
        ),
        (
            "the cached prompt prefix changes nothing",
            lambda: _prefix(model, samples, single),
            "none is needed: bulk encoding runs every input in full, which is slower",
        ),
        (
            "bfloat16 keeps the directions",
            lambda: _drift(model, samples, single),
            "encode in float32: --dtype float32",
        ),
    ]
    return [_run(*check) for check in checks]


def as_table(checks: list[Check]) -> list[list[str]]:
    """Return the results as a table with a header; only a check that failed has a remedy."""
    rows = [
        [check.name, "✓" if check.passed else "✗", check.found, "" if check.passed else check.remedy]
        for check in checks
    ]
    return [["check", "", "found", "remedy"], *rows]


def _run(name: str, check: Callable[[], tuple[bool, str]], remedy: str) -> Check:
    try:
        return Check(name, *check(), remedy)
    except Exception as error:  # whatever a model raises is a finding
        logger.debug("%s", name, exc_info=True)
        return Check(name, False, f"{type(error).__name__}: {str(error)[:80]}", remedy)


def _samples(model: Gen2Embed) -> list[dict[str, Any]]:
    """Return inputs of many lengths: texts, and pictures of noise with and without a text if the model takes them."""
    samples: list[dict[str, Any]] = [
        {"text": text}
        for text in ("a red bicycle", "What is the capital of France, and which river runs through it?", "")
    ]
    if not model.takes_images:
        return [*samples, {"text": "snow " * 40}]
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for width, height in ((96, 96), (200, 80))
    ]
    return [*samples, {"image": pictures[0]}, {"text": "Which animal is it?", "image": pictures[1]}]


def _encoded(model: Gen2Embed, side: Side, samples: list[dict[str, Any]], **options: Any) -> _Vectors:
    vectors: _Vectors = getattr(model, f"encode_{side}")(samples, **options)
    return vectors


def _finite(single: dict[Side, _Vectors]) -> tuple[bool, str]:
    bad = sum(int((~np.isfinite(vectors).all(axis=1)).sum()) for vectors in single.values())
    return bad == 0, f"{bad} of {sum(map(len, single.values()))} are not"


def _apart(pairs: list[_Vectors]) -> tuple[bool, str]:
    least = min(float(np.abs(one - other).max()) for one, other in pairs)
    return least >= DIFFERENT, f"by {least:.2g}"


def _sides_differ(model: Gen2Embed, single: dict[Side, _Vectors]) -> tuple[bool, str]:
    prompt = model.prompt
    if (prompt.query_system, prompt.query_text) == (prompt.document_system, prompt.document_text):
        return True, f"prompt_mode={prompt.name!r} treats them alike"
    return _apart([np.stack([single["query"][0], single["document"][0]])])


def _last_tokens(model: Gen2Embed, samples: list[dict[str, Any]]) -> tuple[bool, str]:
    last = set()
    for side in SIDES:
        for sample in samples:
            features = model.preprocess([sample], task=side)
            last.add(int(features["input_ids"][0][features["attention_mask"][0].bool()][-1]))
    shown = ", ".join(repr(model.tokenizer.decode([token])) for token in sorted(last))
    return len(last) == 1, shown


def _lengths(model: Gen2Embed, samples: list[dict[str, Any]]) -> tuple[bool, str]:
    wrong = 0
    for side in SIDES:
        fitter = model._fitter(side)
        true = [int(model.preprocess([sample], task=side)["attention_mask"].sum()) for sample in samples]
        counted = [fitter.count(model._content(sample)) for sample in samples]
        wrong = max(wrong, *(abs(one - other) for one, other in zip(true, counted, strict=True)))
    return wrong == 0, f"off by {wrong} tokens"


def _close(one: dict[Side, _Vectors], other: dict[Side, _Vectors]) -> tuple[bool, str]:
    difference = max(float(np.abs(one[side] - other[side]).max()) for side in SIDES)
    return difference <= ROUNDING, f"off by {difference:.1g}"  # NaN is no number below it


def _padding(model: Gen2Embed, samples: list[dict[str, Any]]) -> tuple[bool, str]:
    padded = []
    for padding_side in ("left", "right"):
        options = {"processing_kwargs": {"text": {"padding_side": padding_side}}}
        padded.append({side: _encoded(model, side, samples, batch_size=64, **options) for side in SIDES})
    return _close(*padded)


def _prefix(model: Gen2Embed, samples: list[dict[str, Any]], single: dict[Side, _Vectors]) -> tuple[bool, str]:
    encoder = PrefixEncoder(model)
    found: dict[Side, _Vectors] = {}
    for side in SIDES:
        prepared = encoder.prepare(side, samples)
        if not encoder.reuses_prefix:
            return False, f"{side}: other vectors with it"
        found[side] = encoder.encode_prepared(side, prepared)
    passed, difference = _close(single, found)
    return passed, f"{difference}, {prepared.num_shared} tokens"


def _drift(model: Gen2Embed, samples: list[dict[str, Any]], single: dict[Side, _Vectors]) -> tuple[bool, str]:
    model.to(torch.bfloat16)
    cosines = [(_encoded(model, side, samples, batch_size=64) * single[side]).sum(axis=1).min() for side in SIDES]
    return bool(min(cosines) >= LEAST_COSINE), f"cosine {min(cosines):.4f}"
