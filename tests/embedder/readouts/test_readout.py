"""Readouts are the states that hooks on plain transformers find: in memory, with a cached prefix, and exported."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from samples import sample_of
from sentence_transformers import SentenceTransformer
from tiny_any import CHATML, TEXT_ONLY, Tiny, text_config, write_any
from tiny_models import FAMILIES
from tiny_torchvision import LOADABLE
from transformers import AutoModel, AutoModelForImageTextToText

from gen2embed_mteb import Gen2Embed, cli
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.model_folder.adapters import load_adapter, new_adapter, save_adapter
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.readouts.readout import Readout, generator_parts, set_readout
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mteb_plugin.models.revisions import revision_of

READOUTS = [("pre-mlp", True), ("pre-mlp", False), ("drop-1", True), ("drop-1", False), ("last", False)]
LAYER_NORM = {"aya_vision"}
"""Families whose final norm is a LayerNorm, which also centres: no stock module leaves that out."""
BEFORE_MLP = {
    "gemma3": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "lfm2_vl": "ffn_norm",
}
"""The norm that takes the state before the MLP, where it is not `post_attention_layernorm`."""
FINAL_NORM = {"lfm2_vl": "embedding_norm"}
MORE_IN_A_LAYER = {"gemma4"}
"""Families whose layers add inputs of their own behind the MLP, from weights that all layers share."""


@pytest.fixture(scope="module")
def scaled_dir(tiny_dir: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`scaled_dir(family)`: a tiny random model whose norms have random weights, too, so that they matter."""
    written: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in written:
            written[family] = Path(shutil.copytree(tiny_dir(family), tmp_path_factory.mktemp("scaled") / family))
            randomize_norms(written[family])
        return written[family]

    return directory


def randomize_norms(directory: Path) -> None:
    torch.manual_seed(2)
    weights = load_file(directory / "model.safetensors")
    for name, value in weights.items():
        if "norm" in name and name.endswith("weight"):
            weights[name] = value + torch.rand_like(value) - 0.5
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def samples(family: str, pictures: list[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"text": "a red circle"}, {"text": "a b " * 20}]
    if family not in TEXT_ONLY and family != "moe":
        found += [{"image": pictures[0]}, {"text": "What is it?", "image": pictures[2]}]
    return found


def hooked(directory: Path, family: str, model: Gen2Embed, sample: dict[str, Any]) -> Any:
    """The unit vector of the state that a hook on plain transformers sees at the last token, where the model reads."""
    readout, norm = model.readout, model.readout_norm
    inner = AutoModel.from_pretrained(directory)
    decoder = inner.get_decoder()
    last = decoder.layers[-1]
    final = getattr(decoder, FINAL_NORM.get(family, "norm"))
    seen: dict[str, torch.Tensor] = {}

    def keep_input(name: str) -> Any:
        def hook(_: Any, arguments: Any, named: Any) -> None:
            seen[name] = (arguments[0] if arguments else named["hidden_states"]).clone()

        return hook

    last.register_forward_pre_hook(keep_input("drop-1"), with_kwargs=True)
    final.register_forward_pre_hook(keep_input("last"), with_kwargs=True)
    before = getattr(last, BEFORE_MLP.get(family, "post_attention_layernorm"), None)
    if before is not None:
        before.register_forward_pre_hook(keep_input("pre-mlp"), with_kwargs=True)
    else:  # attention and MLP stand side by side
        last.mlp.register_forward_hook(lambda _, __, output: seen.update(mlp=output))
    features = model.preprocess([sample], task="query")
    taken = inspect.signature(inner.forward).parameters
    with torch.inference_mode():
        inner(**{name: value for name, value in features.items() if name in taken})
        if "mlp" in seen:
            seen["pre-mlp"] = seen["last"] - seen["mlp"]
        state = final(seen[readout]) if norm else seen[readout]
    return torch.nn.functional.normalize(state[0, -1], dim=0).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", sample_of([*FAMILIES, *LOADABLE], ["llama"]))
def test_vectors_are_the_hooked_states(scaled_dir: Any, pictures: Any, tmp_path: Path, family: str) -> None:
    """In memory, with the prefix cache, and in plain sentence-transformers; reloaded, the readout is known."""
    inputs = samples(family, pictures)
    digests = {fingerprint(Gen2Embed(scaled_dir(family), device="cpu"))}
    for number, (readout, norm) in enumerate(READOUTS):
        refusal = "LayerNorm does more than scale" if not norm and family in LAYER_NORM else ""
        if readout != "last" and family in MORE_IN_A_LAYER:
            refusal = "also runs per_layer_input_gate" if readout == "pre-mlp" else "embed_tokens_per_layer"
        if refusal:
            with pytest.raises(Gen2EmbedError, match=refusal):
                Gen2Embed(scaled_dir(family), device="cpu", readout=readout, readout_norm=norm)
            continue
        model = Gen2Embed(scaled_dir(family), device="cpu", readout=readout, readout_norm=norm)
        want = np.stack([hooked(scaled_dir(family), family, model, sample) for sample in inputs])
        if readout != "drop-1":  # of Qwen3.5 it leaves layers that change little
            assert np.abs(np.diff(want, axis=0)).max() > 0.01  # the inputs matter
        got = model.encode_query(inputs, batch_size=1)
        assert np.abs(got - want).max() < 1e-6
        assert np.abs(PrefixEncoder(model).encode_query(inputs) - want).max() < 1e-5
        folder = tmp_path / str(number)
        model.save_pretrained(str(folder))
        plain = SentenceTransformer(str(folder), device="cpu")
        assert np.abs(plain.encode_query(inputs, batch_size=1) - want).max() < 1e-6
        assert np.abs(model.encode_query(inputs, batch_size=1) - got).max() == 0  # saving left it as it was
        again = Gen2Embed(folder, device="cpu")
        assert (again.readout, again.readout_norm) == (readout, norm)
        assert np.abs(again.encode_query(inputs, batch_size=1) - want).max() < 1e-6
        assert fingerprint(again) == fingerprint(model)
        assert fingerprint(model) not in digests
        digests.add(fingerprint(model))


def _moe(_: Any, size: int) -> Any:
    return text_config(
        "Qwen3MoeConfig", size, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )


def test_every_expert_of_the_last_layer_is_left_out(tmp_path: Path) -> None:
    directory = write_any(
        "qwen3", tmp_path / "moe", Tiny("Qwen3MoeForCausalLM", _moe, (*CHATML, "<think>", "</think>"))
    )
    randomize_norms(directory)
    model = Gen2Embed(directory, device="cpu", readout="pre-mlp")
    inputs = samples("moe", [])
    want = np.stack([hooked(directory, "moe", model, sample) for sample in inputs])
    assert np.abs(model.encode_query(inputs) - want).max() < 1e-6
    model.save_pretrained(str(tmp_path / "out"))
    assert np.abs(SentenceTransformer(str(tmp_path / "out")).encode_query(inputs) - want).max() < 1e-6
    weights = load_file(tmp_path / "out" / "model.safetensors")
    zero = sorted(name for name, value in weights.items() if not value.any())
    assert [name for name in zero if "layers.1.mlp.experts" in name and "down_proj" in name] == zero != []


def test_what_the_folder_holds(scaled_dir: Any, tmp_path: Path) -> None:
    before = AutoModel.from_pretrained(scaled_dir("qwen2_vl")).state_dict()
    export(scaled_dir("qwen2_vl"), tmp_path / "pre", readout="pre-mlp", readout_norm=False)
    weights = load_file(tmp_path / "pre" / "model.safetensors")
    assert [name for name, value in weights.items() if not value.any() and "weight" in name] == [
        "language_model.layers.1.mlp.down_proj.weight"
    ]
    assert (weights["language_model.norm.weight"] == 1).all()
    config = json.loads((tmp_path / "pre" / "config.json").read_text())
    assert config["gen2embed"] == {"readout": "pre-mlp", "readout_norm": False}
    export(scaled_dir("qwen2_vl"), tmp_path / "drop", readout="drop-1")
    weights = load_file(tmp_path / "drop" / "model.safetensors")
    assert {name for name in weights if ".layers." in name and "visual" not in name} == {
        name for name in before if "language_model.layers.0." in name
    }
    config = json.loads((tmp_path / "drop" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == len(config["text_config"]["layer_types"]) == 1
    # Without a readout nothing of it is written.
    export(scaled_dir("qwen2_vl"), tmp_path / "last", readout="last", readout_norm=True)
    assert "gen2embed" not in json.loads((tmp_path / "last" / "config.json").read_text())


def test_another_readout_is_another_revision_in_mteb(scaled_dir: Any, tmp_path: Path) -> None:
    revisions = {revision_of(str(scaled_dir("qwen2_vl")), "native")}
    for number, (readout, norm) in enumerate(READOUTS):
        folder = export(scaled_dir("qwen2_vl"), tmp_path / str(number), readout=readout, readout_norm=norm)
        revisions.add(revision_of(str(folder), "native"))
    assert len(revisions) == len(READOUTS) + 1


@pytest.mark.parametrize(("readout", "norm"), READOUTS)
def test_the_same_weights_still_generate(scaled_dir: Any, readout: str, norm: bool) -> None:
    """With the generator's parts the states are those of the model without a readout; afterwards it has its own."""
    model = Gen2Embed(scaled_dir("qwen2_vl"), device="cpu", readout=readout, readout_norm=norm)
    inner, plain = model[0].model, AutoModel.from_pretrained(scaled_dir("qwen2_vl"))
    ids = torch.arange(5, 12)[None]
    with torch.inference_mode():
        own = inner(input_ids=ids).last_hidden_state
        with generator_parts(inner) as generator:
            assert torch.equal(generator(input_ids=ids).last_hidden_state, plain(input_ids=ids).last_hidden_state)
            assert set(generator.state_dict()) == set(plain.state_dict())
            assert generator.config.get_text_config().num_hidden_layers == 2
        assert torch.equal(inner(input_ids=ids).last_hidden_state, own)
    assert not torch.equal(own, plain(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize(("readout", "norm"), READOUTS)
def test_the_generator_of_a_model_with_a_readout(readout: str, norm: bool) -> None:
    plain = Gen2Embed("gen2embed-mini", device="cpu")
    model = Gen2Embed("gen2embed-mini", device="cpu", readout=readout, readout_norm=norm)
    before = model.encode_query(["a red circle"])
    assert model.generator.generate(["a red circle"]) == plain.generator.generate(["a red circle"])
    assert np.array_equal(model.encode_query(["a red circle"]), before)


def test_what_a_folder_without_the_weights_refuses(scaled_dir: Any, tmp_path: Path) -> None:
    folders = {
        (readout, norm): export(scaled_dir("llama"), tmp_path / f"{readout}-{norm}", readout=readout, readout_norm=norm)
        for readout, norm in READOUTS
    }
    for (readout, norm), folder in folders.items():
        assert Gen2Embed(folder, device="cpu", readout=readout, readout_norm=norm).readout == readout
        others = [("drop-1" if readout != "drop-1" else "last", norm)] if readout != "last" else []
        others += [(readout, True)] if not norm else []
        for other in others:
            with pytest.raises(Gen2EmbedError, match=rf"was exported with readout='{readout}', readout_norm={norm}"):
                Gen2Embed(folder, device="cpu", readout=other[0], readout_norm=other[1])
    # What is there can still be left out.
    raw = Gen2Embed(folders["pre-mlp", True], device="cpu", readout_norm=False)
    want = Gen2Embed(folders["pre-mlp", False], device="cpu")
    assert np.array_equal(raw.encode_query(["a fox"]), want.encode_query(["a fox"]))
    both = Gen2Embed(folders["last", False], device="cpu", readout="pre-mlp")
    assert np.array_equal(both.encode_query(["a fox"]), want.encode_query(["a fox"]))


def test_a_folder_whose_files_contradict_each_other(scaled_dir: Any, tmp_path: Path) -> None:
    folder = export(scaled_dir("llama"), tmp_path / "model", readout="pre-mlp")
    weights = load_file(folder / "model.safetensors")
    weights["layers.1.mlp.down_proj.weight"][0, 0] = 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Gen2EmbedError, match=r"names the readout 'pre-mlp', but the output weights of layers\.1\.mlp"):
        Gen2Embed(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    for stated in ("pre-mlp", {"readout": "middle"}, {"readout": 3}, {"readout": "last", "readout_norm": "no"}):
        (folder / "config.json").write_text(json.dumps({**config, "gen2embed": stated}))
        with pytest.raises(Gen2EmbedError, match=r"config\.json: gen2embed is .*names no readout"):
            Gen2Embed(folder, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "first"}, r"unknown readout 'first'; known: last, pre-mlp, drop-1"),
        ({"readout": "drop-0"}, r"unknown readout 'drop-0'"),
        ({"readout": ""}, r"unknown readout ''"),
        ({"readout": "drop-2"}, r"it has 2 layers, of which none would be left"),
        ({"readout_norm": "false"}, r"readout_norm is 'false'; pass True or False"),
    ],
)
def test_readouts_that_are_refused(scaled_dir: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Gen2EmbedError, match=message):
        Gen2Embed(scaled_dir("llama"), device="cpu", **options)


def test_other_spellings(scaled_dir: Any) -> None:
    assert Gen2Embed(scaled_dir("llama"), device="cpu", readout="PRE_MLP").readout == "pre-mlp"
    assert [Readout(state).num_dropped for state in ("last", "pre-mlp", "drop-1", "drop-12")] == [0, 0, 1, 12]


def test_a_layer_that_computes_more_behind_its_mlp_is_refused(scaled_dir: Any) -> None:
    """As in Gemma 4, where every layer adds an input of its own at the end."""
    inner = AutoModel.from_pretrained(scaled_dir("llama"))
    layer = inner.layers[-1]
    layer.add_module("more", torch.nn.Linear(32, 32))
    layer.register_forward_hook(lambda _, __, output: output + layer.more(output))
    before = layer.mlp
    with pytest.raises(Gen2EmbedError, match=r"its last layer LlamaDecoderLayer also runs more behind its MLP"):
        set_readout(inner, Readout("pre-mlp"), "a model")
    assert layer.mlp is before
    layer.add_module("moe", torch.nn.Identity())
    layer.register_forward_hook(lambda _, __, output: layer.moe(output))
    with pytest.raises(Gen2EmbedError, match=r"has no single MLP, but .*moe"):
        set_readout(inner, Readout("pre-mlp"), "a model")


def trained_adapter(base: Path, folder: Path, family: str, targets: str) -> Path:
    """An adapter by peft itself, with weights that matter."""
    torch.manual_seed(1)
    kind = AutoModelForImageTextToText if family in FAMILIES else AutoModel
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2_vl", "llama"])
@pytest.mark.parametrize(
    ("readout", "target"), [("pre-mlp", "down_proj"), ("pre-mlp", "up_proj"), ("drop-1", "q_proj")]
)
def test_an_adapter_of_what_is_left_out_is_refused(
    scaled_dir: Any, tmp_path: Path, family: str, readout: str, target: str
) -> None:
    adapter = trained_adapter(scaled_dir(family), tmp_path / "adapter", family, rf".*layers\.\d\..*{target}")
    message = rf"the adapter has the weight .*layers\.1\..*{target}.*readout='{readout}'.*leaves out"
    with pytest.raises(Gen2EmbedError, match=message):
        Gen2Embed(scaled_dir(family), device="cpu", adapter=adapter, readout=readout)
    model = Gen2Embed(scaled_dir(family), device="cpu", readout=readout)
    if readout == "pre-mlp":
        with pytest.raises(Gen2EmbedError, match=message):
            Gen2Embed(export(scaled_dir(family), tmp_path / "out", readout=readout), device="cpu", adapter=adapter)
    with pytest.raises(Gen2EmbedError, match=message):
        load_adapter(model[0].model, adapter)


@pytest.mark.parametrize(("readout", "norm"), sample_of(READOUTS, READOUTS[:3:2]))
@pytest.mark.parametrize("family", sample_of(["qwen2_vl", "llama"], ["llama"]))
def test_a_new_adapter_leaves_it_out_and_fits_the_whole_base(
    scaled_dir: Any, tmp_path: Path, family: str, readout: str, norm: bool
) -> None:
    """In memory, merged in an export, and loaded again, on the base model with all its layers or with the readout."""
    options: dict[str, Any] = {"device": "cpu", "readout": readout, "readout_norm": norm}
    model = Gen2Embed(scaled_dir(family), **options)
    inner = model[0].model
    new_adapter(inner, ("q_proj", "down_proj"), rank=2)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    inner.eval()
    names = {name for name, _ in inner.named_parameters() if "lora_" in name}
    assert any("layers.0.mlp.down_proj" in name for name in names)
    assert any("layers.1.mlp.down_proj" in name for name in names) == (readout == "last")
    assert any("layers.1.self_attn.q_proj" in name for name in names) == (readout != "drop-1")
    want = model.encode_query(["a fox", "b " * 9])
    assert np.abs(want - Gen2Embed(scaled_dir(family), **options).encode_query(["a fox", "b " * 9])).max() > 0.01
    save_adapter(inner, tmp_path / "adapter")
    again = Gen2Embed(scaled_dir(family), device="cpu", adapter=tmp_path / "adapter")  # readout.json names the readout
    assert (again.readout, again.readout_norm) == (readout, norm)
    assert np.abs(again.encode_query(["a fox", "b " * 9]) - want).max() < 1e-6
    model.save_pretrained(str(tmp_path / "merged"))
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert np.abs(plain.encode_query(["a fox", "b " * 9]) - want).max() < 1e-6
    (tmp_path / "adapter" / "readout.json").write_text('{"readout": "middle"}')
    with pytest.raises(Gen2EmbedError, match=r"adapter/readout\.json names no readout \(unknown readout 'middle'"):
        Gen2Embed(scaled_dir(family), device="cpu", adapter=tmp_path / "adapter")
    # A checkpoint keeps the adapter apart, and knows with which readout it was trained.
    model.save_pretrained(str(tmp_path / "checkpoint-1"))
    checkpoint = Gen2Embed(tmp_path / "checkpoint-1", device="cpu")
    assert (checkpoint.readout, checkpoint.readout_norm) == (readout, norm)
    assert np.abs(checkpoint.encode_query(["a fox", "b " * 9]) - want).max() < 1e-6


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("readout", "figure"), [("pre-mlp", 51.3), ("drop-1", 31.4)])
def test_the_figures_of_the_mini(tmp_path: Path, readout: str, figure: float) -> None:
    """`last` scores 54.4. The mini's last MLP hardly turns the state, so that no readout can gain as on real models."""
    words = ["evaluate", "--model_name", "gen2embed-mini", "--benchmark", "mmeb-mini", "--device", "cpu"]
    assert cli.main([*words, "--prompt_mode", "system", "--readout", readout, "--output_dir", str(tmp_path)]) == 0
    assert round(100 * json.loads((tmp_path / "results.json").read_text())["overall"], 1) == figure
