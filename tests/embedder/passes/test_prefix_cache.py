"""The shared beginning: vectors equal those of the full forward, and it is really run once."""

from typing import Any

import numpy as np
import pytest
import torch
from samples import sample_of
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import LSTM, Dense, Dropout, LayerNorm, Normalize, Pooling
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.types import StagedEncoder
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder

SIDES = ("query", "document")


@pytest.fixture(scope="module")
def inputs(pictures: list[Any]) -> list[dict[str, Any]]:
    """Texts and pictures of many lengths; some texts merge with the end of the prompt when they are tokenized."""
    return [
        {"text": "a red circle"},
        {"text": "<|image_1|>\nWhat is it?\n", "image": pictures[0]},
        {"image": pictures[1]},
        {"text": "which of the two is larger, the first or the second one?", "image": pictures[1:3]},
        {"text": "\n\nFind a page.\n"},
        {"text": "x"},
        {"text": ""},
        {"text": "x" * 300},
    ]


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_vectors_are_those_of_the_full_forward(
    tiny: Any, inputs: list[dict[str, Any]], family: str, layout: str
) -> None:
    model = tiny(family, layout=layout)
    encoder = PrefixEncoder(model)
    texts = [entry for entry in inputs if "image" not in entry]
    for side in SIDES:
        stock = getattr(model, f"encode_{side}")
        for batch in (inputs, texts, inputs[:1], inputs[2:3]):
            vectors = getattr(encoder, f"encode_{side}")(batch)
            assert vectors.dtype == np.float32
            assert np.abs(vectors - stock(batch)).max() < 1e-5
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["none", "system", "unime"])
def test_any_prompt_will_do(tiny: Any, inputs: list[dict[str, Any]], mode: str) -> None:
    model = tiny("qwen2_vl", prompt_mode=mode)
    for side in SIDES:
        vectors = getattr(PrefixEncoder(model), f"encode_{side}")(inputs)
        assert np.abs(vectors - getattr(model, f"encode_{side}")(inputs)).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_is_the_system_turn_and_runs_once(tiny: Any, monkeypatch: Any, family: str) -> None:
    model = tiny(family)
    encoder = PrefixEncoder(model)
    lengths: list[int] = []
    stock = type(model[0].model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].numel())
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(type(model[0].model), "forward", forward)
    system = len(model.tokenizer(model.prompt.document_system, add_special_tokens=False)["input_ids"])
    texts = ("a cat", "a dog")
    for text in texts:
        encoder.encode_document([{"text": text}])
    prefix, *rest = lengths
    assert prefix > system > 10
    full = [model.preprocess([{"text": text}], task="document")["input_ids"].shape[1] for text in texts]
    assert rest == [length - prefix for length in full]


def test_reuse_can_be_switched_off(tiny: Any) -> None:
    model = tiny("qwen2_vl")
    assert PrefixEncoder(model).prepare("query", [{"text": "a"}]).num_shared > 10
    full = PrefixEncoder(model, reuse_prefix=False)
    assert full.prepare("query", [{"text": "a"}]).num_shared == 0
    assert np.abs(full.encode_query([{"text": "a"}]) - model.encode_query([{"text": "a"}])).max() < 1e-6


def test_a_window_shorter_than_the_prefix(tiny_dir: Any, inputs: list[dict[str, Any]]) -> None:
    """Mistral layers keep the last tokens of the prefix only; all rows go on from the very same length."""
    model = Gen2Embed(tiny_dir("llava_next"), device="cpu")
    model[0].model.config.text_config.sliding_window = 16
    encoder = PrefixEncoder(model)
    assert encoder.prepare("query", inputs[:1]).num_shared > 16
    for batch in (inputs, inputs[:1], inputs[2:3]):
        assert np.abs(encoder.encode_query(batch) - model.encode_query(batch)).max() < 1e-5


def _with_fault(model: Gen2Embed, fault: Any) -> None:
    """Let the decoder shift its token embeddings by what `fault` returns for its arguments."""

    def shift(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["inputs_embeds"] = model[0].model.get_input_embeddings()(kwargs.pop("input_ids")) + fault(kwargs)
        return args, kwargs

    model[0].model.register_forward_pre_hook(shift, with_kwargs=True)


def test_a_family_that_goes_on_wrongly_from_a_cache_runs_in_full(
    tiny_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    _with_fault(
        model,
        lambda kwargs: 0.01 * (kwargs["past_key_values"].get_seq_length() > 0 if kwargs.get("past_key_values") else 0),
    )
    inputs = [{"text": "a"}, {"text": "a longer text"}]
    encoder = PrefixEncoder(model)
    assert encoder.prepare("query", inputs).num_shared == 0
    assert (
        "the vectors of queries with the cached prompt prefix differ from those of single inputs by 0." in caplog.text
    )
    assert "every input now runs in full" in caplog.text
    assert np.abs(encoder.encode_query(inputs) - model.encode_query(inputs)).max() < 1e-6
    assert encoder.count_tokens("query", ["a"], [[]]) == model.count_tokens(["a"], [[]], task="query")


def test_a_family_whose_vectors_depend_on_the_batch_is_reported(
    tiny_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    _with_fault(model, lambda kwargs: 0.01 * (len(kwargs["position_ids"]) > 1))
    assert PrefixEncoder(model).prepare("document", [{"text": "a"}]).num_shared == 0
    assert "the vectors of documents in a batch of texts and images differ" in caplog.text
    assert "use batches of one input" in caplog.text


def test_a_sound_family_is_not_warned_about(tiny_dir: Any, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Gen2Embed(tiny_dir("gemma3"), device="cpu", model_kwargs={"dtype": dtype})
        assert PrefixEncoder(model).prepare("query", [{"text": "a"}]).num_shared > 20
    assert not caplog.text


def test_truncated_vectors_are_units_again(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", truncate_dim=8)
    whole = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").encode_query(["a"])[:, :8]
    assert np.abs(PrefixEncoder(model).encode_query([{"text": "a"}]) - whole / np.linalg.norm(whole)).max() < 1e-6


def test_half_precision_gives_float32_units(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    vectors = PrefixEncoder(model).encode_document([{"text": "a fox"}, {"text": "b"}])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    exact = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").encode_document(["a fox", "b"])
    assert (vectors * exact).sum(axis=1).min() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_counted_within_two_tokens(tiny: Any, inputs: list[dict[str, Any]], family: str) -> None:
    model = tiny(family)
    encoder = PrefixEncoder(model)
    assert isinstance(encoder, StagedEncoder)
    pictures = [entry.get("image", []) for entry in inputs]
    sizes = [[p.size for p in (given if isinstance(given, list) else [given])] for given in pictures]
    for side in SIDES:
        counted = encoder.count_tokens(side, [entry.get("text", "") for entry in inputs], sizes)
        true = [encoder.prepare(side, [entry]).input_ids.shape[1] for entry in inputs]
        assert max(abs(one - other) for one, other in zip(counted, true, strict=True)) <= 2
        assert sorted(range(8), key=true.__getitem__)[-1] == counted.index(max(counted))
    assert encoder.count_tokens("query", [], []) == []


def _behind(model: Any, name: str) -> None:
    """Put modules behind the pooled vector, as a folder may have them."""
    torch.manual_seed(7)
    dense, norm = Dense(32, 16), LayerNorm(32)
    with torch.no_grad():
        norm.norm.weight.normal_()
    router = Router({"query": [Dense(32, 16)], "document": [Dense(32, 16), LayerNorm(16)]}, "document")
    parts = {
        "Dense": [dense, Normalize()],
        "Dense behind Normalize": [Normalize(), dense],
        "LayerNorm": [norm, Normalize()],
        "Router": [router, Normalize()],
        "Dropout": [Dropout(0.5), Normalize()],
        "nothing": [],
    }[name]
    del model[2]
    for number, part in enumerate(parts, 2):
        model.add_module(str(number), part.to(model.dtype).eval())


@pytest.mark.parametrize("truncate_dim", sample_of([None, 8], [8]))
@pytest.mark.parametrize("name", ["Dense", "Dense behind Normalize", "LayerNorm", "Router", "Dropout", "nothing"])
@pytest.mark.slow
def test_modules_behind_pooling_are_run(
    tiny_dir: Any, inputs: list[dict[str, Any]], name: str, truncate_dim: int | None
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", truncate_dim=truncate_dim)
    plain = model.encode_query(inputs)
    _behind(model, name)
    encoder = PrefixEncoder(model)
    for side in SIDES:
        stock = getattr(model, f"encode_{side}")(inputs)
        units = stock / np.linalg.norm(stock, axis=1, keepdims=True)
        vectors = getattr(encoder, f"encode_{side}")(inputs)
        assert vectors.shape == (8, model.get_embedding_dimension() or 16)
        assert np.abs(vectors - units).max() < 1e-5
    if name in ("Dense", "LayerNorm") and truncate_dim:
        assert np.abs(model.encode_query(inputs) - plain).max() > 0.1


def test_modules_behind_pooling_in_half_precision(tiny_dir: Any, inputs: list[dict[str, Any]]) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", model_kwargs={"dtype": torch.bfloat16})
    _behind(model, "Dense")
    vectors = PrefixEncoder(model, reuse_prefix=False).encode_query(inputs)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert (vectors * model.encode_query(inputs)).sum(axis=1).min() > 0.995


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LSTM(32, 16), "cannot run the module LSTM behind Pooling"),
        (Pooling(32, "mean"), "cannot run the module Pooling behind Pooling"),
        (Dense(32, 32, module_input_name="token_embeddings"), "cannot run the module Dense behind Pooling"),
        (Router({"query": [LSTM(32, 16)], "document": [Dense(32, 8)]}, "query"), "cannot run the module LSTM"),
    ],
    ids=["LSTM", "Pooling", "Dense of tokens", "LSTM in a Router"],
)
def test_modules_that_need_more_than_the_pooled_vector_are_refused(tiny_dir: Any, module: Any, message: str) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    model.add_module("3", module)
    with pytest.raises(ValueError, match=message):
        PrefixEncoder(model)


def test_modules_before_pooling_are_refused(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    first, *others = list(model)
    between = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    parts = [first, Dense(32, 32, module_input_name="token_embeddings"), *others]
    for number, part in enumerate(parts):
        between._modules[str(number)] = part
    with pytest.raises(ValueError, match="made of Transformer, Dense, Pooling, Normalize; bulk encoding needs"):
        PrefixEncoder(between)


def test_system_prompts_of_the_model_are_used_as_encode_does(tiny_dir: Any, inputs: list[dict[str, Any]]) -> None:
    prompts = {"query": "Find what is meant. ", "passage": "Say what it is. "}
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompts=prompts)
    encoder = PrefixEncoder(model)
    plain = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu").encode_query(inputs)
    assert np.abs(model.encode_query(inputs) - plain).max() > 1e-2
    for side in SIDES:
        stock = getattr(model, f"encode_{side}")(inputs)
        assert np.abs(getattr(encoder, f"encode_{side}")(inputs) - stock).max() < 1e-5
