"""Every family, in whatever shape its processor gives images: the cached loss against a loss from one pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import gradients
from PIL import Image
from tiny_any import ANY, MULTIMODAL, write_any

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from trainers import SahaLoss
from trainers.batches.collation import CellReader
from trainers.batches.image_rows import ROWS_OF, image_features, minibatch
from trainers.loss.content_hash import content_digests

RANDOM = np.random.default_rng(3)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8))


WIDE, SMALL, TALL = picture(200, 60), picture(64, 64), picture(40, 150)
QUERIES = [{"text": "a text alone"}, {"image": WIDE}, {"text": "and a text", "image": SMALL}, {"text": "one more"}]
CANDIDATES = [{"image": TALL}, {"text": "short"}, {"text": "a longer text of some words"}, {"image": SMALL}]


@pytest.fixture(scope="module", params=ANY)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gen2Embed:
    folder: Path = write_any(request.param, tmp_path_factory.mktemp("models") / request.param)
    return Gen2Embed(folder, device="cpu")


def columns(model: Gen2Embed) -> list[dict]:
    has_images = type(model.processor).__name__.endswith("Processor")
    reader = CellReader(model, image_options=model.image_options)
    texts = [[cell if has_images else {"text": cell.get("text", "in place of an image")} for cell in cells]
             for cells in (QUERIES, CANDIDATES)]
    return [reader(cells, task=task) for cells, task in zip(texts, ("query", "document"), strict=True)]


def test_gradients_are_those_of_one_pass_over_the_whole_batch(model: Gen2Embed) -> None:
    features = columns(model)
    loss = SahaLoss(model, mini_batch_size=1, mask_equal_positives=False)
    queries, candidates = (
        torch.nn.functional.normalize(model({**column})["sentence_embedding"]) for column in features
    )
    value = torch.nn.functional.cross_entropy(queries @ candidates.T * loss.scale, torch.arange(len(queries)))
    wanted = gradients(model, value)
    model.train(False)
    got = gradients(model, loss(features, None))
    assert wanted.keys() == got.keys()
    overall = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= 1e-5 * overall, name
