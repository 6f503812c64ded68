"""What worker processes prepare for a model: the features of the model itself, to the bit."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from samples import sample_of
from tiny_any import ANY

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.preparation.compact_patches import PIXELS, CompactPatches
from gen2embed_mteb.images.source import ImageSource

ALL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next", "phi3_v", *ANY)
COMPACT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def inputs_of(model: Any, pictures: list[Image.Image]) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = [{"text": "What is it?"}, {"text": "a <|im_end|> b"}]
    if not model.takes_images:
        return texts
    large = [picture.resize((max(picture.width, 28), max(picture.height, 28))) for picture in pictures]
    return [*texts, *({"image": picture} for picture in large), {"text": "a cat", "image": large[0]}]


@pytest.mark.parametrize("family", sample_of(ALL, ["qwen2_vl", "llava_next", "llama"]))
def test_a_preparer_that_was_pickled_prepares_the_same(
    tiny: Callable[..., Any], family: str, pictures: list[Image.Image]
) -> None:
    encoder = PrefixEncoder(tiny(family))
    inputs = inputs_of(tiny(family), pictures)
    sent = pickle.dumps(encoder.preparer(), protocol=5)
    assert len(sent) < sum(parameter.nbytes for parameter in tiny(family).parameters()) + 10**6
    preparer = pickle.loads(sent)
    assert not list(preparer._model.parameters())
    for side in ("query", "document"):
        expected = encoder.prepare(side, inputs)
        arrays = preparer(encoder.arguments(side), inputs)
        found = encoder.completed(side, arrays)
        assert np.array_equal(encoder.encode_prepared(side, found), encoder.encode_prepared(side, expected))
        for name in ("input_ids", "attention_mask", "position_ids", "last", "pooled"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None and other is None) or torch.equal(one, other), name
        assert found.num_shared == expected.num_shared
        assert found.others.keys() == expected.others.keys()
        for name, feature in expected.others.items():
            given = found.others[name]
            if found.patches is not None and name == PIXELS:
                assert given.nbytes * 8 == feature.nbytes
                given = found.patches.expanded(given)
            assert given.dtype == feature.dtype, name
            assert torch.equal(given, feature), name
        used = type(getattr(tiny(family).processor, "image_processor", None)).__name__ == "Qwen2VLImageProcessorPil"
        assert (found.patches is not None) == used
        assert used or family not in COMPACT


def test_prompts_of_a_dataset_reach_the_workers(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen2_vl", prompt_mode="lens")
    encoder = PrefixEncoder(model)
    other = encoder.for_dataset("N24News")
    assert other is not None
    preparer, inputs = pickle.loads(pickle.dumps(encoder.preparer())), [{"text": "a"}, {"text": "some words"}]
    for one in (encoder, other):
        found = one.completed("query", preparer(one.arguments("query"), inputs))
        expected = one.prepare("query", inputs)
        assert torch.equal(found.input_ids, expected.input_ids)
    assert encoder.arguments("query") != other.arguments("query")


def processor(**settings: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},  # Qwen3-VL's
        {"size": {"shortest_edge": 3136, "longest_edge": 50_000}, "merge_size": 1, "temporal_patch_size": 1},
        {"rescale_factor": 1 / 127.5, "image_mean": [0.1, 0.7, 1.3], "image_std": [0.3, 0.9, 0.01]},
    ],
)
def test_compact_patches_are_those_of_the_processor(settings: dict[str, Any]) -> None:
    """Photographs cannot show more than all bytes of all channels at all places, which noise has."""
    random = np.random.default_rng(1)
    pictures = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in [(56, 56), (28, 300), (411, 97), (640, 480)]
    ]
    stock, own = processor(**settings), processor(**settings)
    compact = CompactPatches.of(stock)
    assert compact is not None
    compact.install(own)
    expected, found = (one(pictures, return_tensors="pt") for one in (stock, own))
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(compact.expanded(found[PIXELS]), expected[PIXELS])
    assert torch.equal(compact._expanded_by_torch(found[PIXELS]), expected[PIXELS])  # as on a GPU


def test_other_processors_are_left_as_they_are() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert CompactPatches.of(None) is None
    assert CompactPatches.of(CLIPImageProcessorPil()) is None
    assert CompactPatches.of(processor(do_normalize=False)) is None

    class Subclass(type(processor())):  # may do anything
        pass

    assert CompactPatches.of(Subclass()) is None


def test_a_processor_that_works_otherwise_keeps_its_own_patches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if another version of transformers shifted every patch by one."""
    stock = processor()
    kind = type(stock)
    before = kind.patchify

    def shifted(self: Any, image: np.ndarray, **sizes: Any) -> Any:
        return before(self, np.roll(image, 1, axis=-1), **sizes)

    monkeypatch.setattr(kind, "patchify", shifted)
    assert CompactPatches.of(stock) is None
    assert "cannot be made of bytes" in caplog.text


def vectors(model: Any, folder: Path, place: Path, num_workers: int) -> np.ndarray:
    bulk = BulkEncoder(
        PrefixEncoder(model), EmbeddingStore(place, {}), ImageSource(folder), num_workers=num_workers, batch_tokens=300
    )
    items = [Item("what is it? " * number, (f"{number}.png",)) for number in range(4)]
    items += [Item("two", ("0.png", "1.png")), Item("text"), Item("", ("2.png",))]
    bulk.add("query", items)
    bulk.add("document", items)
    return np.stack([bulk.vectors("query", items), bulk.vectors("document", items)])


@pytest.mark.slow
@pytest.mark.exhaustive  # each worker loads torch and sentence-transformers
@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "phi3_v", "gemma3"])
def test_vectors_are_the_same_with_worker_processes(
    tiny: Callable[..., Any], family: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    expected = vectors(tiny(family), tmp_path, tmp_path / "0", 0)
    for count in (1, 2) if family == "qwen2_vl" else (2,):
        assert np.array_equal(vectors(tiny(family), tmp_path, tmp_path / str(count), count), expected)
