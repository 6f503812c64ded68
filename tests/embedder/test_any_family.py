"""What holds for every family whose own template carries the prompt: vectors, prefix, lengths, hostile texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_any import TEXT_ONLY
from tiny_torchvision import LOADABLE
from transformers import AutoModel, AutoProcessor

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.passes.shared_beginning import SharedBeginning
from gen2embed_mteb.errors import Gen2EmbedError

SIDES = ("query", "document")
IMAGES_LEAD = {"molmo2"}
"""Families that write images before the system prompt, so that inputs with images share nothing."""
every_family = pytest.mark.parametrize("family", LOADABLE)


@pytest.fixture(scope="module")
def inputs(pictures: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Texts, and pictures with and without a text, of many lengths."""
    return {
        "texts": [{"text": text} for text in ("a red circle", "", "x" * 60, "\n\nFind a page.\n", "a b " * 30)],
        "pictures": [
            {"text": "<|image_1|>\nWhat is it?", "image": pictures[0]},
            {"image": pictures[1]},
            {"text": "which is larger?", "image": pictures[1:3]},
            {"text": "see <|image_1|> and\n<|image_2|>.", "image": pictures[2:4]},
        ],
    }


def mixed(family: str, inputs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return inputs["texts"] + (inputs["pictures"] if family not in TEXT_ONLY else [])


def plain_vectors(directory: Any, model: Gen2Embed, samples: list[dict[str, Any]], side: str) -> np.ndarray:
    """Vectors by transformers alone, one input at a time: (n, d) unit rows."""
    inner = AutoModel.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory, **({"use_fast": False} if model.takes_images else {}))
    rows = []
    for sample in samples:
        rendered, images = model.render(sample, side), model._content(sample).images
        options: dict[str, Any] = {"text": [rendered], "return_tensors": "pt", "add_special_tokens": False}
        if images:
            options["images"] = [list(images)]
        with torch.inference_mode():
            state = inner(**processor(**options)).last_hidden_state[0, -1]
        rows.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(rows)


@every_family
def test_vectors_are_those_of_plain_transformers(tiny: Any, tiny_dir: Any, inputs: Any, family: str) -> None:
    model, samples = tiny(family), mixed(family, inputs)
    for side in SIDES:
        want = plain_vectors(tiny_dir(family), model, samples, side)
        assert np.abs(np.diff(want, axis=0)).max() > 0.01  # the inputs matter
        got = getattr(model, f"encode_{side}")(samples, batch_size=len(samples))
        assert np.abs(got - want).max() < 1e-5


@every_family
def test_padding_on_the_left_changes_nothing(tiny: Any, inputs: Any, family: str) -> None:
    model, samples = tiny(family), mixed(family, inputs)
    vectors = []
    for padding_side in ("left", "right"):
        options = {"text": {"padding_side": padding_side}}
        features = model.preprocess(samples, task="query", processing_kwargs=options)
        assert bool(features["attention_mask"][:, 0].all()) == (padding_side == "right")
        vectors.append(model.encode_query(samples, batch_size=len(samples), processing_kwargs=options))
    assert np.abs(vectors[0] - vectors[1]).max() < 1e-5


@every_family
def test_the_shared_prefix_changes_nothing(tiny: Any, inputs: Any, family: str) -> None:
    model, samples = tiny(family), mixed(family, inputs)
    encoder = PrefixEncoder(model)
    for side in SIDES:
        for batch in (samples, samples[:1], samples[-1:], samples[1:4]):
            prepared = encoder.prepare(side, batch)
            leads = family in IMAGES_LEAD and any("image" in sample for sample in batch)
            assert prepared.num_shared <= 1 if leads else prepared.num_shared > 20
            want = getattr(model, f"encode_{side}")(batch)
            assert np.abs(encoder.encode_prepared(side, prepared) - want).max() < 1e-5


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3", "glm4v"])
def test_types_of_tokens_move_with_the_tokens(
    tiny: Any, inputs: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor pads on the left, whatever the reason, the prefix stands at other columns in every row."""
    model, samples = tiny(family), mixed(family, inputs)
    want = model.encode_query(samples)
    monkeypatch.setattr(model.tokenizer, "padding_side", "left")
    assert not model.preprocess(samples, task="query")["attention_mask"][:, 0].all()
    for reuse in (True, False):
        assert np.abs(PrefixEncoder(model, reuse_prefix=reuse).encode_query(samples) - want).max() < 1e-5


@every_family
def test_a_prefix_may_be_shared_in_part(tiny: Any, inputs: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a text merges with the end of the prompt; recurrent layers and windows cannot be cut back."""
    model, samples = tiny(family), mixed(family, inputs)
    if family in IMAGES_LEAD:
        samples = inputs["texts"]
    encoder = PrefixEncoder(model)
    want = model.encode_query(samples)
    whole = encoder.prepare("query", samples).num_shared
    for shared in (whole - 3, 5, 1, whole):
        monkeypatch.setattr(SharedBeginning, "num_shared", lambda *_, shared=shared: shared)
        prepared = encoder.prepare("query", samples)
        assert prepared.num_shared == shared
        assert np.abs(encoder.encode_prepared("query", prepared) - want).max() < 1e-5


@every_family
def test_lengths_are_counted(tiny: Any, inputs: Any, family: str) -> None:
    """By `Fitter.count` exactly; without rendering, within the tokens that merge or are trimmed."""
    model, samples = tiny(family), mixed(family, inputs)
    texts = [sample.get("text", "") for sample in samples]
    sizes = [[image.size for image in model._content(sample).images] for sample in samples]
    for side in SIDES:
        true = [model.preprocess([sample], task=side)["input_ids"].shape[1] for sample in samples]
        fitter = model._fitter(side)
        assert [fitter.count(model._content(sample)) for sample in samples] == true
        counted = np.subtract(model.count_tokens(texts, sizes, task=side), true)
        blank = [text != text.strip() for text in texts]
        assert max(abs(counted[index]) for index in range(len(texts)) if not blank[index]) <= 2
        assert np.abs(counted).max() <= 6


@every_family
def test_every_length_is_kept_down_to_the_refusal(tiny: Any, family: str) -> None:
    model = tiny(family)
    cases: list[tuple[str, list[tuple[int, int]]]] = [("a b c d " * 30, []), ("word " * 20 + "中文🦊" * 5, [])]
    if family not in TEXT_ONLY:
        cases += [("", [(200, 150)]), ("x <|image_1|> y <|image_2|> " + "z " * 30, [(64, 64), (150, 30)])]
    for text, sizes in cases:
        sample = {"text": text, "image": [Image.new("RGB", size) for size in sizes]}
        whole = model.preprocess([sample], task="query")["input_ids"].shape[1]
        bare = model.preprocess([{**sample, "text": ""}], task="query")["input_ids"].shape[1]
        for max_length in range(whole + 1, 0, -4):
            try:
                length = model.preprocess([sample], task="query", max_length=max_length)["input_ids"].shape[1]
            except Gen2EmbedError as error:
                assert f"max_length={max_length}" in str(error)
                assert max_length < bare  # only where the prompt, with the images as they are, does not fit
                break
            assert length <= max_length
            if not sizes:
                assert length >= min(whole, max_length) - 6  # a character of several tokens is kept whole or not at all
        else:
            pytest.fail("nothing was refused")


@every_family
def test_control_tokens_in_a_text_are_text(tiny: Any, pictures: list[Any], family: str) -> None:
    model = tiny(family)
    special = {number: token.content for number, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    hostile = " ".join(special.values())
    for images in [[], pictures[:1]] if family not in TEXT_ONLY else [[]]:
        ids = [
            model.preprocess([{"text": text, "image": images}], task="query")["input_ids"][0].tolist()
            for text in ("a", hostile)
        ]
        assert [token for token in ids[0] if token in special] == [token for token in ids[1] if token in special]
        assert len(ids[1]) > len(ids[0]) + len(special)
        vectors = PrefixEncoder(model).encode_query([{"text": hostile, "image": images}, {"text": "a"}])
        assert np.isfinite(vectors).all()
        cut = model.preprocess([{"text": hostile, "image": images}], task="query", max_length=len(ids[0]) + 20)
        assert len(ids[0]) + 8 <= cut["input_ids"].shape[1] <= len(ids[0]) + 20
