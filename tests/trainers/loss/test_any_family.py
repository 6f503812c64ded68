"""Every family, in whatever shape its processor gives images: the cached loss against a loss from one pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import gradients
from PIL import Image
from samples import sample_of
from tiny_any import write_any
from tiny_torchvision import LOADABLE

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.chat_formats.probing import takes_images
from gen2embed_mteb.embedder.families.generic import LORA_TARGETS
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter, save_adapter
from gen2embed_mteb.embedder.preparation.inputs import content_of
from gen2embed_mteb.errors import Gen2EmbedError
from trainers import SahaLoss
from trainers.batches.collation import CellReader
from trainers.batches.image_rows import AXIS, NUM_ROWS, ImageRows, check_minibatches, image_features, minibatch
from trainers.loss.content_hash import content_digests
from trainers.loss.saha_loss import TEMPERATURE

RANDOM = np.random.default_rng(3)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8))


WIDE, SMALL, TALL = picture(200, 60), picture(64, 64), picture(40, 150)
QUERIES = [{"text": "a text alone"}, {"image": WIDE}, {"text": "and a text", "image": SMALL}, {"text": "one more"}]
CANDIDATES = [{"image": TALL}, {"text": "short"}, {"text": "a longer text of some words"}, {"image": SMALL}]


@pytest.fixture(scope="module", params=sample_of(LOADABLE))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gen2Embed:
    folder: Path = write_any(request.param, tmp_path_factory.mktemp("models") / request.param, LOADABLE[request.param])
    return Gen2Embed(folder, device="cpu")


def columns(model: Gen2Embed) -> list[dict]:
    reader = CellReader(model, image_options=model.image_options)
    if not takes_images(model.processor):
        return [
            reader([{"text": cell.get("text", "in place of an image")} for cell in cells], task=task)
            for cells, task in ((QUERIES, "query"), (CANDIDATES, "document"))
        ]
    return [reader(cells, task=task) for cells, task in ((QUERIES, "query"), (CANDIDATES, "document"))]


def one_pass(model: Gen2Embed, features: list[dict]) -> torch.Tensor:
    """InfoNCE of the pairs, from one pass over each column."""
    queries, candidates = (model({**column})["sentence_embedding"] for column in features)
    return torch.nn.functional.cross_entropy(queries @ candidates.T / TEMPERATURE, torch.arange(len(queries)))


def assert_equal(model: Gen2Embed, got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Up to 1e-5 of the largest gradient; more where padding alone makes as much: recurrent layers, and Gemma 4."""
    config = model[0].model.config
    recurrent = "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())
    tolerance = 1e-4 if recurrent else {"gemma4": 3e-5}.get(config.model_type, 1e-5)
    assert got.keys() == wanted.keys()
    overall = max(gradient.abs().max() for gradient in wanted.values())
    assert overall > 0
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= tolerance * overall, name


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_those_of_one_pass_over_the_whole_batch(model: Gen2Embed, size: int) -> None:
    features = columns(model)
    loss = SahaLoss(model, mini_batch_size=size, mask_equal_positives=False)
    assert_equal(model, gradients(model, loss(features)), gradients(model, one_pass(model, features)))


def test_an_adapter_lies_in_the_decoder_and_gets_the_same_gradients(model: Gen2Embed, tmp_path: Path) -> None:
    """With the vision tower frozen, its tokens are computed once."""
    adapted = Gen2Embed(model.source, device="cpu")
    inner = adapted[0].model
    torch.manual_seed(0)  # before the adapter: its A is drawn
    new_adapter(inner, LORA_TARGETS, rank=2, dropout=0.0, allow_missing=True)
    for name, weight in inner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, 0, 0.05)
    trained = {name for name, weight in inner.named_parameters() if weight.requires_grad}
    decoder = {id(weight) for weight in inner.get_decoder().parameters()}
    assert {name for name, weight in inner.named_parameters() if id(weight) in decoder} >= trained
    features = columns(adapted)
    wanted = gradients(adapted, one_pass(adapted, features))
    assert_equal(
        adapted, gradients(adapted, SahaLoss(adapted, mini_batch_size=1, mask_equal_positives=False)(features)), wanted
    )
    assert {name.removeprefix("0.model.") for name, found in wanted.items() if found.abs().max() > 0} == trained
    save_adapter(inner, tmp_path)
    again = Gen2Embed(model.source, adapter=tmp_path, device="cpu")
    texts = ["a red circle", "b"]
    assert np.abs(again.encode_query(texts) - adapted.encode_query(texts)).max() < 1e-6
    assert np.abs(model.encode_query(texts) - adapted.encode_query(texts)).max() > 1e-3


def test_each_input_is_cut_as_if_it_stood_alone(model: Gen2Embed) -> None:
    if not takes_images(model.processor):
        pytest.skip("reads text alone")
    reader = CellReader(model, image_options=model.image_options)
    whole = reader(QUERIES, task="query")
    for number, cell in enumerate(QUERIES):
        cut, alone = minibatch(whole, number, number + 1), reader([cell], task="query")
        assert image_features(cut) == image_features(alone)
        vectors = [model({**features})["sentence_embedding"].detach() for features in (cut, alone)]
        assert (vectors[0] - vectors[1]).abs().max() < 1e-5


def test_equal_rows_have_equal_digests(model: Gen2Embed) -> None:
    if not takes_images(model.processor):
        pytest.skip("reads text alone")
    cells = [{"image": WIDE}, {"text": "a"}, {"image": SMALL}, {"image": WIDE}, {"text": "a"}, {"image": TALL}]
    digests = content_digests(CellReader(model, image_options=model.image_options)(cells)).tolist()
    assert digests[0] == digests[3]
    assert digests[1] == digests[4]
    assert len(set(digests)) == 4


def test_images_that_cannot_be_told_apart_are_an_error(model: Gen2Embed) -> None:
    features = columns(model)[0]
    if not any(name.endswith(NUM_ROWS) for name in features):
        pytest.skip("sentence-transformers cuts them itself")
    rows = ImageRows(model[0])
    axis = int(features["pixel_values" + AXIS][0]) if "pixel_values" + AXIS in features else 0
    pixels = features["pixel_values"]
    features["pixel_values"] = torch.cat([pixels, pixels.narrow(axis, 0, 1)], dim=axis)
    with pytest.raises(Gen2EmbedError, match=r"pixel_values .*cannot be fine-tuned on images"):
        rows.add(features, [content_of(cell) for cell in QUERIES])


def test_a_model_that_gives_other_vectors_for_a_mini_batch_is_refused(model: Gen2Embed) -> None:
    if not takes_images(model.processor):
        pytest.skip("reads text alone")
    reader = CellReader(model, image_options=model.image_options)
    check_minibatches(model, reader)
    inner = model[0].model

    def by_the_batch(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + len(output.last_hidden_state)
        return output

    handle = inner.get_decoder().register_forward_hook(by_the_batch)
    try:
        with pytest.raises(Gen2EmbedError, match=r"cannot be fine-tuned on images .* differ by"):
            check_minibatches(model, reader)
    finally:
        handle.remove()
