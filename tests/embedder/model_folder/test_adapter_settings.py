"""Folders of adapters that come from others: refused before peft imports, copies, or matches for ever."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from model_folders import copied, edited, in_hub_cache, pickled
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from samples import sample_of
from transformers import AutoModelForImageTextToText

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder import adapter_settings
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mteb_plugin.models.model_files import facts_of
from gen2embed_mteb.mteb_plugin.models.revisions import directory_digest, hub_commit

TEXTS = ["a red circle", "two blue squares"]
LAYERS = r".*language_model.*\.(q_proj|v_proj)"


def written(base, folder, **options):
    """An adapter with weights that matter, written by peft."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": LAYERS, **options})
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory):
    return written(tiny_dir("qwen2_vl"), tmp_path_factory.mktemp("adapter"))


def refusal(base, adapter) -> str:
    """The one line with which an adapter is refused, by itself and on its base."""
    said = []
    for name, options in ((base, {"adapter": adapter}), (adapter, {})):
        with pytest.raises((Gen2EmbedError, FileNotFoundError)) as error:
            Gen2Embed(name, device="cpu", **options)
        assert "\n" not in str(error.value)
        said.append(str(error.value))
    return " ".join(said)


KEYS = [
    {"peft_type": "IA3"},
    {"peft_type": None},
    {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "imported_by_peft"},
    {"megatron_core": "imported_by_peft"},
    {"layer_replication": [[0, 1_000_000]]},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "loftq"},
    {"eva_config": {"rho": 2.0}},
    {"corda_config": {"cache_file": "/dev/zero"}},
    {"use_qalora": True},
    {"alora_invocation_tokens": [1]},
    {"target_parameters": ["x"]},
    {"runtime_config": {"ephemeral_gpu_offload": True}},
    {"a_key_of_the_future": {"fetch": "this"}},
    {"rank_pattern": {"(a+)+$": 4}},
    {"alpha_pattern": {"(.*a){20}": 4}},
    {"layers_pattern": "(a+)+"},
    {"r": 10**9},
    {"r": "4"},
    {"rank_pattern": {"q_proj": 10**9}},
    {"lora_alpha": "16"},
    {"lora_dropout": 2},
    {"target_modules": ["q_proj", 7]},
    {"target_modules": "(unclosed"},
    {"base_model_name_or_path": ["a"]},
]


@pytest.mark.parametrize("keys", KEYS, ids=[f"{number}-{next(iter(keys))}" for number, keys in enumerate(KEYS)])
@pytest.mark.slow
def test_keys_that_import_fetch_copy_or_run_are_refused(tiny_dir, adapter, tmp_path, monkeypatch, keys):
    (tmp_path / "imported_by_peft.py").write_text("ran = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = edited(adapter, tmp_path / "adapter", "adapter_config.json", lambda settings: settings.update(keys))
    assert "adapter_config.json" in refusal(tiny_dir("qwen2_vl"), folder)
    assert "imported_by_peft" not in sys.modules


@pytest.mark.parametrize("pattern", sample_of([r"(.*.*)*\.nothing", r"(\w+\.?)+!", r"(.*\.?){20}!"], [r"(\w+\.?)+!"]))
@pytest.mark.slow
def test_a_pattern_that_never_ends_is_refused(tiny_dir, adapter, tmp_path, monkeypatch, pattern):
    monkeypatch.setattr(adapter_settings, "MATCHING_SECONDS", 1)
    for key in ("target_modules", "exclude_modules"):
        folder = edited(
            adapter, tmp_path / key, "adapter_config.json", lambda settings, key=key: settings.update({key: pattern})
        )
        with pytest.raises(Gen2EmbedError, match="takes for ever to match"):
            Gen2Embed(tiny_dir("qwen2_vl"), adapter=folder, device="cpu")


def test_patterns_select_the_layers_that_peft_selects(tiny_dir, tmp_path):
    """The same vectors as with the layers' names, and the pattern is what is saved again."""
    base = tiny_dir("qwen2_vl")
    patterned = written(
        base, tmp_path / "pattern", target_modules=r".*layers\.\d+\..*(q_proj|v_proj)", exclude_modules=r".*\.1\..*"
    )
    model = Gen2Embed(base, adapter=patterned, device="cpu")
    layers = sorted(name for name, module in model[0].model.named_modules() if hasattr(module, "lora_A"))
    assert layers == [f"language_model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    config = model[0].model.peft_config["default"]
    assert (config.target_modules, config.exclude_modules) == (r".*layers\.\d+\..*(q_proj|v_proj)", r".*\.1\..*")
    named = edited(
        patterned,
        tmp_path / "named",
        "adapter_config.json",
        lambda s: s.update(target_modules=layers, exclude_modules=None),
    )
    assert np.array_equal(Gen2Embed(base, adapter=named, device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_keys_without_effect_are_read(tiny_dir, adapter, tmp_path):
    """Later versions of peft write more keys, and older ones fewer."""

    def change(settings):
        settings |= {"a_key_of_the_future": None, "another": False, "auto_mapping": {"parent_library": "os"}}
        settings.pop("peft_version", None)

    folder = edited(adapter, tmp_path / "adapter", "adapter_config.json", change)
    base = tiny_dir("qwen2_vl")
    want = Gen2Embed(base, adapter=adapter, device="cpu").encode_query(TEXTS)
    assert np.array_equal(Gen2Embed(base, adapter=folder, device="cpu").encode_query(TEXTS), want)


def test_a_layer_that_is_lost_whole_is_missed(tiny_dir, adapter, tmp_path):
    folder = copied(adapter, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1.self_attn.q_proj" not in name}, path)
    assert "2 missing keys" in refusal(tiny_dir("qwen2_vl"), folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, None])
def test_damaged_files(tiny_dir, adapter, tmp_path, content):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = copied(adapter, tmp_path / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] if content is None else content)
        assert str(folder / name) in refusal(tiny_dir("qwen2_vl"), folder)


def test_a_base_model_is_checked_too(tiny_dir, adapter, tmp_path):
    base = pickled(tiny_dir("qwen2_vl"), tmp_path / "base", tmp_path / "proof")
    (base / "model.safetensors").unlink()
    folder = edited(
        adapter, tmp_path / "a", "adapter_config.json", lambda s: s.update(base_model_name_or_path=str(base))
    )
    with pytest.raises(Gen2EmbedError, match=r"pytorch_model\.bin is pickled"):
        Gen2Embed(folder, device="cpu")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/base", "someone/a-base"])
def test_a_base_model_that_is_not_there_is_named(adapter, tmp_path, base):
    folder = edited(adapter, tmp_path / "a", "adapter_config.json", lambda s: s.update(base_model_name_or_path=base))
    with pytest.raises(
        FileNotFoundError, match=r"adapter_config\.json names the base model .* no such folder"
    ) as error:
        Gen2Embed(folder, device="cpu")
    assert base in str(error.value)
    assert "pass the base model yourself" in str(error.value)


def test_adapters_that_name_each_other_are_refused(adapter, tmp_path):
    folder = tmp_path / "a"
    edited(adapter, folder, "adapter_config.json", lambda s: s.update(base_model_name_or_path=str(folder)))
    with pytest.raises(Gen2EmbedError, match="as base model, which is an adapter"):
        Gen2Embed(folder, device="cpu")
    with pytest.raises(Gen2EmbedError, match="as base model, an adapter"):
        directory_digest(folder)
    assert hub_commit("no hub id at all") is None


def test_a_folder_that_is_both_is_refused(tiny_dir, adapter, tmp_path):
    folder = copied(tiny_dir("qwen2_vl"), tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    with pytest.raises(Gen2EmbedError, match="holds a whole model and an adapter"):
        Gen2Embed(folder, device="cpu")
    with pytest.raises(Gen2EmbedError, match="holds a whole model and an adapter"):
        Gen2Embed(folder, adapter=adapter, device="cpu")


def test_adapters_in_the_hubs_cache(tiny_dir, adapter, tmp_path, monkeypatch):
    """By hub id, with its base by hub id at the revision it names; and checked."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    base = in_hub_cache(tiny_dir("qwen2_vl"), cache, "org/base")
    (base.parents[1] / "refs" / "main").write_text("f" * 40)  # a newer one, which is not here
    said = {"base_model_name_or_path": "org/base", "revision": base.name}
    folder = edited(adapter, tmp_path / "a", "adapter_config.json", lambda settings: settings.update(said))
    in_hub_cache(folder, cache, "org/adapter")
    want = Gen2Embed(tiny_dir("qwen2_vl"), adapter=adapter, device="cpu").encode_query(TEXTS)
    model = Gen2Embed("org/adapter", device="cpu", cache_folder=str(cache))
    assert np.array_equal(model.encode_query(TEXTS), want)
    assert model[0].model.config.name_or_path == "org/base"
    model = Gen2Embed(tiny_dir("qwen2_vl"), adapter="org/adapter", device="cpu", cache_folder=str(cache))
    assert np.array_equal(model.encode_query(TEXTS), want)
    bad = edited(adapter, tmp_path / "b", "adapter_config.json", lambda s: s.update(layer_replication=[[0, 10**6]]))
    in_hub_cache(bad, cache, "org/bad")
    with pytest.raises(Gen2EmbedError, match="layer_replication"):
        Gen2Embed(tiny_dir("qwen2_vl"), adapter="org/bad", device="cpu", cache_folder=str(cache))


def test_mteb_reads_an_adapters_facts_through_the_same_checks(adapter, tiny_dir, tmp_path):
    assert facts_of(adapter) == {
        "adapted_from": json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    }
    bad = edited(adapter, tmp_path / "b", "adapter_config.json", lambda s: s.update(layer_replication=[[0, 10**6]]))
    with pytest.raises(Gen2EmbedError, match="layer_replication"):
        facts_of(bad)
