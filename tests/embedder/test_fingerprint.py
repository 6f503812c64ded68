"""Whatever decides vectors is in the fingerprint, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers.sentence_transformer.modules import Dense
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.embedder.fingerprint import _canonical, fingerprint

TEXTS = ["a red circle", "which of the two is larger?"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_its_fingerprint(tiny_dir: Any, exported: Any, family: str) -> None:
    model = Gen2Embed(tiny_dir(family), device="cpu")
    first = fingerprint(model)
    assert len(first) == 64
    model.encode_query(["a", "b " * 5000])  # cutting and padding leave no trace
    assert fingerprint(model) == first
    assert fingerprint(Gen2Embed(exported(family), device="cpu")) == first


def _rope_theta(config: Any) -> None:
    config.get_text_config().rope_parameters["rope_theta"] = 500.0


def _sliding_window(config: Any) -> None:
    config.get_text_config().sliding_window = 4


def _layer_types(config: Any) -> None:
    config.get_text_config().layer_types = ["full_attention", "sliding_attention"]


def _epsilon(config: Any) -> None:
    config.get_text_config().rms_norm_eps = 0.5


def _vision(config: Any) -> None:
    config.vision_config.spatial_merge_size = 1


def _image_token(config: Any) -> None:
    config.image_token_id += 1


@pytest.mark.parametrize("change", [_rope_theta, _sliding_window, _layer_types, _epsilon, _vision, _image_token])
def test_the_configuration_decides(tiny_dir: Any, change: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    before = fingerprint(model)
    change(model[0].model.config)
    assert fingerprint(model) != before


def test_another_rope_theta_on_disk_gives_other_vectors_and_another_fingerprint(tiny_dir: Any, tmp_path: Any) -> None:
    """The weights are the same to the bit: it was one fingerprint."""
    import json

    export(tiny_dir("qwen2_vl"), tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    one, other = (Gen2Embed(source, device="cpu") for source in (tiny_dir("qwen2_vl"), tmp_path / "other"))
    assert np.abs(one.encode_query(TEXTS) - other.encode_query(TEXTS)).max() > 1e-3
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "name", ["transformers_version", "_name_or_path", "_commit_hash", "use_cache", "architectures"]
)
def test_versions_and_places_decide_nothing(tiny_dir: Any, name: str) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    before = fingerprint(model)
    setattr(model[0].model.config, name, "something else")
    assert fingerprint(model) == before


def test_what_another_version_lists_and_leaves_unset_decides_nothing() -> None:
    one = {"a": 1.0, "b": {"c": [1, {"d": 2}]}, "transformers_version": "5.0"}
    other = {"b": {"c": [1, {"d": 2, "new": None}], "off": False}, "a": 1, "empty": {}, "list": []}
    assert _canonical(one) == _canonical(other) == {"a": 1, "b": {"c": [1, {"d": 2}]}}
    assert _canonical({"a": 0}) == {"a": 0} != _canonical({})


def test_an_adapters_strength_and_switch_decide(tiny_dir: Any) -> None:
    """The weights of alpha 4 and alpha 8 are the same."""
    found = {}
    for alpha in (4, 8):
        torch.manual_seed(1)
        model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
        model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False))
        found[alpha] = fingerprint(model)
    assert found[4] != found[8]
    model.disable_adapters()
    assert fingerprint(model) not in found.values()


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda model: model.add_module("3", Dense(32, 32, init_weight=torch.eye(32), bias=False))),
        ({"model_kwargs": {"dtype": torch.bfloat16}}, None),
        ({"prompt_mode": "none"}, None),
        ({"layout": "official"}, None),
        ({"max_length": 200}, None),
        ({"truncate_dim": 8}, None),
        ({"resize": "official"}, None),
        ({"prompts": {"query": "Find. "}}, None),
        ({"model_kwargs": {"attn_implementation": "eager"}}, None),
        ({}, lambda model: setattr(model.processor.image_processor, "image_mean", [0.1, 0.2, 0.3])),
    ],
)
def test_settings_decide(tiny_dir: Any, tiny: Any, options: dict[str, Any], change: Any) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", **options)
    if change is not None:
        change(model)
    assert fingerprint(model) != fingerprint(tiny("qwen2_vl"))


def test_an_activation_without_weights_decides(tiny_dir: Any) -> None:
    found = set()
    for activation in (torch.nn.Tanh(), torch.nn.ReLU(), None):
        model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
        model.add_module("3", Dense(32, 32, False, activation, init_weight=torch.eye(32)))
        found.add(fingerprint(model))
    assert len(found) == 3
