"""LoRA and DoRA adapters made and saved by peft itself: every key is checked, and vectors survive the round trip."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from samples import sample_of
from sentence_transformers import SentenceTransformer
from tiny_models import FAMILIES
from transformers import AutoModel, AutoModelForImageTextToText

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.embedder.families import FAMILIES as RECORDS
from gen2embed_mteb.embedder.model_folder.adapters import has_adapter, load_adapter, merged_copy

# Of the official recipe, by name alone, wherever a family has them: its vision tower included.
EVERYWHERE = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "k_proj", "q_proj", "out_proj", "v_proj", "qkv"]
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "official": {"use_dora": True, "target_modules": EVERYWHERE, "init_lora_weights": "gaussian"},
}
HEADS = {"auto": AutoModel, "generation": AutoModelForImageTextToText}


def train(base: torch.nn.Module, family: str, **kind: object) -> PeftModel:
    """An adapter with weights that matter, as after training: peft's own start is the identity."""
    torch.manual_seed(1)
    # The language model's projections alone; the vision tower has some of the same names.
    targets = rf".*language_model.*\.({'|'.join(RECORDS[family].lora_targets)})"
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": targets, **kind}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter) / 2)
            else:
                parameter.normal_(0, 0.2)
    return model


def vectors_in_memory(base_dir, trained: PeftModel, inputs: list) -> np.ndarray:
    """What the trained model computes, peft's layers in place: a Gen2Embed around that very model."""
    embedder = Gen2Embed(base_dir, device="cpu")
    inner = trained.get_base_model()
    embedder[0].model = (inner.model if hasattr(inner, "lm_head") else inner).eval()
    return embedder.encode_query(inputs)


@pytest.fixture(scope="module")
def inputs(pictures):
    return ["a red circle", pictures[0], {"text": "<|image_1|>\nWhat is it?\n", "image": pictures[1]}]


@pytest.fixture(scope="module")
def adapter(tiny_dir, tmp_path_factory, inputs):
    """`adapter(family, kind, head)`: a saved adapter's directory, and the vectors of the model it was saved from."""
    made = {}

    def make(family="qwen2_vl", kind="dora", head="generation"):
        if (family, kind, head) not in made:
            trained = train(HEADS[head].from_pretrained(tiny_dir(family)), family, **KINDS[kind])
            directory = tmp_path_factory.mktemp("adapter")
            trained.save_pretrained(directory)
            made[family, kind, head] = directory, vectors_in_memory(tiny_dir(family), trained, inputs)
        return made[family, kind, head]

    return make


def altered(source, target, change):
    """A copy of an adapter with `change` applied to its weights."""
    shutil.copytree(source, target)
    weights = load_file(target / "adapter_model.safetensors")
    save_file(change(weights), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", sample_of(KINDS, ["lora", "dora"]))
@pytest.mark.parametrize("family", sample_of(FAMILIES, ["qwen2_vl"]))
@pytest.mark.slow
def test_a_reloaded_adapter_gives_the_vectors_it_was_trained_to(adapter, tiny_dir, tiny, inputs, *, family, kind, head):
    directory, want = adapter(family, kind, head)
    assert np.abs(want - tiny(family).encode_query(inputs)).max() > 1e-2  # it does something
    for model in (Gen2Embed(tiny_dir(family), adapter=directory), Gen2Embed(directory)):
        assert has_adapter(model[0].model)
        assert not model[0].model.training
        assert np.abs(model.encode_query(inputs) - want).max() < 1e-5


def test_the_magnitudes_of_dora_are_read_from_the_file(adapter, tmp_path, inputs):
    """On its own, transformers drops them on loading, and recomputes them from the base weights."""
    directory, want = adapter()

    def magnified(weights):
        assert any(name.endswith("lora_magnitude_vector") for name in weights)
        return {name: value * 2 if "magnitude" in name else value for name, value in weights.items()}

    assert np.abs(Gen2Embed(altered(directory, tmp_path / "x2", magnified)).encode_query(inputs) - want).max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.slow
def test_merged_on_export(adapter, tiny_dir, tmp_path, inputs, kind):
    directory, want = adapter("qwen2_vl", kind)
    exported = export(tiny_dir("qwen2_vl"), tmp_path / "merged", adapter=directory)
    again = export(directory, tmp_path / "by_adapter_alone")
    for path in (exported, again):
        assert not (path / "adapter_config.json").exists()
        stored = load_file(path / "model.safetensors")
        assert not [name for name in stored if "lora" in name or "base_layer" in name]
        plain = SentenceTransformer(str(path))
        assert np.abs(plain.encode_query([{"text": inputs[0]}, *inputs[1:]]) - want).max() < 1e-5
        assert np.abs(Gen2Embed(path).encode_query(inputs) - want).max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_saving_leaves_the_model_in_memory_as_it_was(adapter, tmp_path, inputs, family):
    directory, want = adapter(family)
    model = Gen2Embed(directory)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(str(tmp_path / "saved"))
    assert has_adapter(model[0].model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert np.abs(Gen2Embed(tmp_path / "saved").encode_query(inputs) - want).max() < 1e-5


def test_merging_a_copy(adapter):
    directory, _ = adapter()
    model = Gen2Embed(directory)[0].model
    merged = merged_copy(model)
    assert has_adapter(model)
    assert not has_adapter(merged)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_an_adapter_on_an_exported_directory(adapter, exported, inputs):
    directory, want = adapter()
    model = Gen2Embed(exported("qwen2_vl"), adapter=directory)
    assert np.abs(model.encode_query(inputs) - want).max() < 1e-5


def test_the_prompt_and_layout_of_choice_go_with_an_adapter(adapter, inputs):
    directory, want = adapter()
    model = Gen2Embed(directory, prompt_mode="none", layout="official")
    assert (model.prompt_mode, model.layout) == ("none", "official")
    assert np.abs(model.encode_query(inputs) - want).max() > 1e-2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_missing_key_is_refused(adapter, tiny_dir, tmp_path, kind):
    directory, _ = adapter("qwen2_vl", kind)
    names = sorted(load_file(directory / "adapter_model.safetensors"))
    for number, wanted in enumerate({name.rpartition("proj.")[2] for name in names}):  # one key of every sort
        lost = next(name for name in names if name.endswith(wanted))

        def without(weights, lost=lost):
            return {name: value for name, value in weights.items() if name != lost}

        broken = altered(directory, tmp_path / str(number), without)
        for name, options in ((tiny_dir("qwen2_vl"), {"adapter": broken}), (broken, {})):
            with pytest.raises(ValueError, match=r"does not fit Qwen2VLModel: 1 missing .*, 0 unexpected") as error:
                Gen2Embed(name, **options)
            assert str(broken) in str(error.value)
            assert lost.rpartition("layers.")[2] in str(error.value)


def test_an_unexpected_key_is_refused(adapter, tmp_path):
    directory, _ = adapter()

    def with_one_more(weights):
        name, value = next(iter(weights.items()))
        return {**weights, name.replace("layers.0", "layers.9"): value.clone()}

    broken = altered(directory, tmp_path / "broken", with_one_more)
    with pytest.raises(ValueError, match=r"0 missing keys \[\], 1 unexpected keys \['.*layers\.9\..*'\]"):
        Gen2Embed(broken)


def test_a_wrong_shape_is_refused(adapter, tmp_path):
    directory, _ = adapter()

    def shortened(weights):
        name = next(name for name in weights if name.endswith("lora_A.weight"))
        return {**weights, name: weights[name][:2].clone()}

    broken = altered(directory, tmp_path / "broken", shortened)
    with pytest.raises(ValueError, match=r"lora_A.weight has shape \(2, \d+\), the model expects \(4, \d+\)"):
        Gen2Embed(broken)


@pytest.mark.parametrize(
    ("family", "pattern", "replacement"),
    [
        ("qwen2_vl", r"^base_model\.model\.model\.language_model\.", "base_model.model.model."),
        ("qwen2_vl", r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model."),
        ("llava_next", r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model."),
    ],
)
def test_keys_of_older_layouts_are_understood(adapter, tmp_path, inputs, *, family, pattern, replacement):
    """Before 4.52, transformers kept the language model elsewhere; released adapters carry those names."""
    directory, want = adapter(family)

    def renamed(weights):
        older = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
        assert older.keys() != weights.keys()
        return older

    older = altered(directory, tmp_path / "older", renamed)
    assert np.abs(Gen2Embed(older).encode_query(inputs) - want).max() < 1e-5


def test_a_refused_adapter_without_weights_leaves_the_model_as_it_was(adapter, tiny_dir, tmp_path):
    directory, _ = adapter()
    shutil.copytree(directory, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "adapter_model.safetensors")
    (tmp_path / "pickled" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors; pickled \.bin weights are not read"):
        Gen2Embed(tmp_path / "pickled")
    model = Gen2Embed(tiny_dir("qwen2_vl"))[0].model
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "pickled")
    assert not has_adapter(model)


def test_an_adapter_on_an_adapter_is_refused(adapter, tiny_dir):
    directory, _ = adapter()
    with pytest.raises(ValueError, match=r"is itself an adapter; pass its base model .*qwen2_vl"):
        Gen2Embed(directory, adapter=directory)


def test_an_adapter_that_names_no_base_is_refused(adapter, tiny_dir, tmp_path, inputs):
    directory, want = adapter()
    shutil.copytree(directory, tmp_path / "orphan")
    settings = json.loads((tmp_path / "orphan" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="names no base_model_name_or_path; pass the base model and adapter="):
        Gen2Embed(tmp_path / "orphan")
    model = Gen2Embed(tiny_dir("qwen2_vl"), adapter=tmp_path / "orphan")
    assert np.abs(model.encode_query(inputs) - want).max() < 1e-5


def test_an_adapter_that_sentence_transformers_added_and_saved(tiny_dir, tmp_path, inputs, caplog):
    """Training with `add_adapter` and plain `save` leaves base weights elsewhere and an adapter in the directory."""
    model = Gen2Embed(tiny_dir("qwen2_vl"))
    model.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.2)
    want = model.eval().encode_query(inputs)
    model.save_pretrained(str(tmp_path / "merged"))
    assert np.abs(Gen2Embed(tmp_path / "merged").encode_query(inputs) - want).max() < 1e-5
    SentenceTransformer.save(model, str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    again = Gen2Embed(tmp_path / "adapter").encode_query(inputs[0])
    assert np.abs(again - want[0]).max() < 1e-5
    # transformers' own reading of it loses the magnitudes, and says so; ours sets them, so there is nothing to say.
    assert "LOAD REPORT" not in caplog.text
