"""Eq. 1: the published example's uniform values, and attention equal to what transformers returns for all layers."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from gen2embed_mteb.analysis.attention import measure as module
from gen2embed_mteb.analysis.attention.figures import averaged, figures_of
from gen2embed_mteb.analysis.attention.measure import LayerAttention, measure, reduced, uniform_received
from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError


def layer_of(received: Any, last: Any) -> LayerAttention:
    return LayerAttention(0, np.array(received), uniform_received(len(received)), np.array(last), np.zeros((1, 1)))


def test_uniform_attention_alone_gives_these_values_on_the_published_example() -> None:
    """31 tokens of system, 256 of image, 21 of user: 6.58 / 0.364 / 0.515 were measured on them."""
    received = uniform_received(31 + 256 + 21)
    system, image, user = np.split(received, [31, 31 + 256])
    assert system.mean() == pytest.approx(3.28, abs=0.005)
    assert image.mean() == pytest.approx(0.803, abs=0.0005)
    assert user.mean() == pytest.approx(0.0365, abs=0.00005)
    assert received.sum() == pytest.approx(308)


def test_uniform_attention_of_three_tokens_by_hand() -> None:
    assert uniform_received(3).tolist() == pytest.approx([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])


def test_figures_by_hand() -> None:
    layer = layer_of([2.0, 0.5, 0.5], [0.5, 0.125, 0.375])
    found = figures_of(layer, {"a": np.array([True, False, False]), "b": np.array([False, True, True])})
    assert found["a"].efficiency == 2.0
    assert found["a"].over_uniform == pytest.approx(2 / (11 / 6))
    assert found["b"].efficiency == 0.5
    assert found["b"].uniform == pytest.approx((5 / 6 + 1 / 3) / 2)
    assert (found["a"].last_row, found["a"].last_row_without_first) == (0.5, 0.0)
    assert (found["b"].last_row, found["b"].last_row_without_first) == (0.5, 1.0)
    assert (found["b"].tokens, found["b"].first) == (2, 1)
    assert averaged([found, {"b": found["b"]}])["b"] == found["b"]


def test_weights_are_reduced_as_slow_loops_reduce_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS", 3)
    length, block = 7, 3
    scores = torch.randn(2, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)
    weights = scores.softmax(dim=-1)
    found = reduced(5, weights, None)
    mean = weights.mean(0).double().numpy()
    assert found.layer == 5
    for column in range(length):
        assert found.received[column] == pytest.approx(sum(mean[row, column] for row in range(length)), abs=1e-6)
        assert found.uniform[column] == pytest.approx(sum(1 / (row + 1) for row in range(column, length)), abs=1e-6)
    np.testing.assert_allclose(found.last, mean[-1], atol=1e-7)
    for down in range(3):
        for across in range(3):
            rows, columns = (range(block * at, min(length, block * at + block)) for at in (down, across))
            seen = [mean[row, column] for row in rows for column in columns if column <= row]
            cell = found.pooled[down, across]
            assert math.isnan(cell) if not seen else cell == pytest.approx(np.mean(seen), abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3_text", "llama"])
def test_every_layer_is_what_transformers_returns_for_all_of_them(tiny: Any, family: str) -> None:
    """The oracle keeps all layers at once; what a row may see is read from where its weights are not zero."""
    model = tiny(family)
    content = model.fitted([{"text": "a red circle over a blue square, and nothing else in the whole picture"}])[0]
    ids, layers = measure(model, content, "query", 4096)
    decoder = model[0].model.get_decoder()
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            every = decoder(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        decoder.set_attn_implementation(before)
    assert len(layers) == len(every) > 1
    for layer, weights in zip(layers, every, strict=True):
        mean = weights[0].mean(0).double().numpy()
        np.testing.assert_allclose(layer.received, mean.sum(0), atol=1e-5)
        np.testing.assert_allclose(layer.last, mean[-1], atol=1e-6)
        seen = mean > 0
        np.testing.assert_allclose(layer.uniform, (seen / seen.sum(1, keepdims=True)).sum(0), atol=1e-5)
        assert layer.received.sum() == pytest.approx(len(ids), abs=1e-3)


def test_one_layers_weights_are_in_memory_at_a_time(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    taking = module._taking

    def watched(*arguments: Any) -> Any:
        hook = taking(*arguments)

        def take(part: Any, given: Any, kwargs: Any, output: Any) -> None:
            if isinstance(output, tuple) and output[1] is not None:
                assert [one() for one in seen] == [None] * len(seen)
                seen.append(weakref.ref(output[1]))
            hook(part, given, kwargs, output)

        return take

    monkeypatch.setattr(module, "_taking", watched)
    _, layers = measure(tiny("gemma3_text"), Content("a red circle"), "query", 4096)
    assert len(seen) == len(layers) > 1


def test_the_model_is_left_as_it_was(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    decoder = model[0].model.get_decoder()
    before, vector = decoder.config._attn_implementation, model.encode_query(["a red circle"])
    hooks = [len(part._forward_hooks) for layer in decoder.layers for part in layer.children()]
    measure(model, Content("a red circle"), "query", 4096)
    assert decoder.config._attn_implementation == before != "eager"
    assert hooks == [len(part._forward_hooks) for layer in decoder.layers for part in layer.children()]
    np.testing.assert_array_equal(model.encode_query(["a red circle"]), vector)


def test_a_long_input_is_refused_with_the_remedy(tiny: Any) -> None:
    with pytest.raises(Gen2EmbedError, match=r"the input has \d+ tokens.* raise --max_tokens"):
        measure(tiny("qwen2_vl"), Content("a red circle"), "query", 10)
