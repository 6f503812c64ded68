"""An input with an image and a text as the sum of two vectors."""

from __future__ import annotations

from typing import Any

import numpy as np

from gen2embed_mteb.embedder.passes.sum_of_parts import encode_sum_of_parts


def test_an_input_of_both_is_the_sum_of_its_parts(tiny: Any, pictures: list[Any]) -> None:
    model = tiny("llava_next", prompt_mode="unime")
    inputs = ["a fox", pictures[0], {"text": "<|image_1|>\nWhat is it?", "image": pictures[1]}]
    inputs += [{"text": "both", "image": pictures[:2]}]
    found = encode_sum_of_parts(model, inputs, "query")
    text, image, two = model.encode_query(["What is it?", pictures[1], {"image": pictures[:2]}])
    both = model.encode_query(["both"])[0]
    wanted = [*model.encode_query(inputs[:2]), text + image, two + both]
    for row, vector in zip(found, wanted, strict=True):
        assert np.abs(row - vector / np.linalg.norm(vector)).max() < 1e-5
    assert np.abs(found[2] - model.encode_query(inputs[2:3])[0]).max() > 0.01
    assert encode_sum_of_parts(model, []).shape == (0, model.get_embedding_dimension())
