"""Folders that come from others: what they ask for is refused before anything reads them; ordinary ones load."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_folders import COMMIT, WriteFile, copied, edited, in_hub_cache, pickled, reweighted
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    Transformer,
)
from tiny_models import FAMILIES

import gen2embed_mteb
from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.export import export
from gen2embed_mteb.embedder.model_folder.checked_loading import check_keys
from gen2embed_mteb.embedder.model_folder.checks import Source, find
from gen2embed_mteb.embedder.model_folder.weight_files import ModelFolderError, read_header
from gen2embed_mteb.errors import Gen2EmbedError

ROOT = Path(gen2embed_mteb.__file__).parents[1]
TEXTS = ["a red circle", "two blue squares"]
UNSAFE = {"weights_only": False, "use_safetensors": False}


def refusal(name: object, **options: object) -> str:
    """The one line with which a model is refused."""
    with pytest.raises((Gen2EmbedError, FileNotFoundError)) as error:
        Gen2Embed(name, device="cpu", **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Pickled weights


@pytest.fixture
def hostile(exported, tmp_path):
    """A folder that made sentence-transformers unpickle, and the file that its pickle writes."""
    proof = tmp_path / "proof"
    folder = pickled(exported("qwen2_vl"), tmp_path / "hostile", proof)
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    settings["model_kwargs"] = UNSAFE
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder, proof


def test_the_pickle_of_these_tests_does_run(hostile):
    """By plain sentence-transformers, which is told nothing but the folder; so the tests below prove something."""
    folder, proof = hostile
    with pytest.raises(Exception, match=r"proof|Weights only|TextIOWrapper|UnpicklingError|str"):
        SentenceTransformer(str(folder), device="cpu")
    assert proof.exists()


def ways(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Every way to have a folder loaded."""
    monkeypatch.setenv("GEN2EMBED_MODEL", str(folder))
    return {
        "Gen2Embed": lambda: Gen2Embed(folder, device="cpu"),
        "adapter": lambda: Gen2Embed(folder, adapter=folder, device="cpu"),
        "export": lambda: export(folder, folder.parent / "exported", device="cpu"),
        "short name": lambda: SentenceTransformer("gen2embed", device="cpu"),
        "short name of ours": lambda: Gen2Embed("gen2embed", device="cpu"),
        "mteb": lambda: __import__("gen2embed_mteb.mteb_plugin.models.model_table", fromlist=["chosen"]).chosen(),
        "mteb's loader": lambda: __import__("gen2embed_mteb.mteb_plugin.models.encoder", fromlist=["load"]).load(
            "Gen2Embed/x", source=str(folder), device="cpu"
        ),
    }


@pytest.mark.parametrize("key", ["model_kwargs", "model_args"])
def test_no_pickle_runs_whichever_way_it_is_loaded(hostile, monkeypatch, key):
    folder, proof = hostile
    path = folder / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    settings[key] = settings.pop("model_kwargs")
    path.write_text(json.dumps(settings))
    for way, load in ways(folder, monkeypatch).items():
        with pytest.raises(
            Gen2EmbedError, match=rf"sentence_bert_config\.json: {key} is .*weights_only.*gen2embed export"
        ):
            load()
        assert not proof.exists(), way


@pytest.mark.slow
def test_no_pickle_runs_from_the_command_line_or_vlm2vec(hostile, tmp_path, preloaded):
    """One line and exit status 2, in processes of their own."""
    folder, proof = hostile
    env = {"GEN2EMBED_MODEL": str(folder)}
    for arguments in (
        ["export", str(folder), str(tmp_path / "out")],
        ["export", "gen2embed", str(tmp_path / "out")],
    ):
        done = preloaded.run(["-m", "gen2embed_mteb.cli", *arguments], cwd=tmp_path, **env)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "sentence_bert_config.json" in done.stderr
        assert not proof.exists()
        assert not (tmp_path / "out").exists()


def test_vlm2vec_loads_through_the_same_checks(hostile):
    from types import SimpleNamespace

    from gen2embed_mteb.bulk.processes import Share
    from vlm2vec_adapter.options import Options
    from vlm2vec_adapter.scripts.session import Session

    folder, proof = hostile
    session = Session(Options(), "v2", Share(), lambda _: {})
    session._data_args = SimpleNamespace(max_len=None, encode_output_path=None)
    asked = SimpleNamespace(model_name=str(folder), checkpoint_path=None, lora=False)
    with pytest.raises(ModelFolderError, match="model_kwargs"):
        session.load(asked)
    assert not proof.exists()


def test_pickled_weights_beside_safetensors_are_not_read(tiny_dir, tiny, tmp_path):
    folder = pickled(tiny_dir("qwen2_vl"), tmp_path / "both", tmp_path / "proof")
    model = Gen2Embed(folder, device="cpu", model_kwargs={"use_safetensors": False, "weights_only": False})
    assert np.abs(model.encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("which", ["base", "exported"])
@pytest.mark.slow
def test_a_folder_without_safetensors_is_refused_with_the_way_to_convert_it(
    tiny_dir, exported, tiny, tmp_path, *, which, preloaded_stock
):
    folder = copied(tiny_dir("qwen2_vl") if which == "base" else exported("qwen2_vl"), tmp_path / "bin")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    said = refusal(folder)
    assert "pytorch_model.bin is pickled" in said
    if which == "base":  # what the message says is what helps
        command = said.partition('python -c "')[2].rpartition('"')[0]
        preloaded_stock.run(["-c", command], check=True)
        assert np.abs(Gen2Embed(folder).encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6


@pytest.mark.parametrize("name", [".metadata", "shard-00000-model-00000-of-00001.safetensors"])
def test_distributed_checkpoints_are_refused(tiny_dir, tmp_path, name):
    """Torch unpickles their `.metadata`."""
    folder = copied(tiny_dir("qwen2_vl"), tmp_path / "model")
    (folder / name).write_bytes(pickle.dumps(WriteFile(tmp_path / "proof")))
    assert "distributed checkpoints are not read" in refusal(folder)
    assert not (tmp_path / "proof").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def _set(*path: str, to: object):
    def change(settings):
        for name in path[:-1]:
            settings = settings[name]
        settings[path[-1]] = to

    return change


KERNEL = "some-org/some-kernel"
SETTINGS = [
    ("sentence_bert_config.json", _set("config_args", to={"cache_dir": "/tmp/x"})),
    ("sentence_bert_config.json", _set("model_kwargs", to={"offload_folder": "outside", "device_map": "auto"})),
    ("sentence_bert_config.json", _set("model_kwargs", to={"allow_all_kernels": True, "attn_implementation": KERNEL})),
    ("sentence_bert_config.json", _set("model_kwargs", to=[])),
    ("sentence_bert_config.json", _set("config_kwargs", to={"auto_map": {}})),
    ("sentence_bert_config.json", _set("processor_kwargs", "chat_template", to="x")),
    ("sentence_bert_config.json", _set("processing_kwargs", "chat_template", "chat_template", to="x")),
    ("sentence_bert_config.json", _set("processing_kwargs", "chat_template", "sanitize_control_tokens", to=False)),
    ("sentence_bert_config.json", _set("processing_kwargs", "text", to={"max_length": 10**12})),
    ("sentence_bert_config.json", _set("modality_config", "message", "method", to="save_pretrained")),
    ("sentence_bert_config.json", _set("modality_config", "text", "method_output_name", to="x")),
    ("sentence_bert_config.json", _set("tokenizer_name_or_path", to="other/repository")),
    ("sentence_bert_config.json", _set("transformer_task", to="text-generation")),
    ("sentence_bert_config.json", _set("query_expansion", to={"x": 1})),
    ("sentence_roberta_config.json", _set("model_kwargs", to=UNSAFE)),
    ("config_sentence_transformers.json", _set("prompts", to={"query": ["a"]})),
    ("config_sentence_transformers.json", _set("default_prompt_name", to=["query"])),
    ("config_sentence_transformers.json", _set("model_type", to="SparseEncoder")),
    ("1_Pooling/config.json", _set("pooling_mode_lasttoken", to="yes")),
    ("1_Pooling/config.json", _set("kwargs", to={})),
    ("2_Normalize/config.json", _set("module_output_name", to="token_embeddings")),
    ("config.json", _set("auto_map", to={"AutoModel": "modeling.Model"})),
    ("config.json", _set("_attn_implementation", to=KERNEL)),
    ("config.json", _set("attn_implementation", to={"": "sdpa", "text_config": KERNEL})),
    ("config.json", _set("text_config", "_attn_implementation", to=KERNEL)),
    ("config.json", _set("attn_implementation", to="flash_attention_2")),  # not installed: it would be fetched
    ("config.json", _set("experts_implementation", to=KERNEL)),
    ("config.json", _set("quantization_config", to={"quant_method": "fp8"})),
    ("config.json", _set("text_config", "quantization_config", to={"quant_method": "awq"})),
    ("config.json", _set("transformers_weights", to="pytorch_model.bin")),
    ("config.json", _set("fusion_config", to={"a": 1})),
    ("config.json", _set("dtype", to="load")),
    ("config.json", _set("vision_config", "torch_dtype", to="int8")),
    ("config.json", _set("text_config", "num_hidden_layers", to=10**6)),
    ("config.json", _set("vision_config", "depth", to=10**6)),
    ("config.json", _set("text_config", "hidden_size", to=10**9)),
    ("config.json", _set("text_config", "vocab_size", to=10**12)),
    ("config.json", _set("text_config", "hidden_size", to="32")),
    ("config.json", _set("text_config", to="someone/a-config")),
    ("config.json", _set("num_labels", to=10**9)),
    ("config.json", _set("text_config", "layer_types", to=["full_attention"] * 10**5)),
    ("tokenizer_config.json", _set("auto_map", to={"AutoTokenizer": ["tok.Tok", None]})),
    ("tokenizer_config.json", _set("trust_remote_code", to=True)),
    ("tokenizer_config.json", _set("tokenizer_class", to="MistralCommonBackend")),
    ("tokenizer_config.json", _set("processor_class", to="Wav2Vec2ProcessorWithLM")),
    ("tokenizer_config.json", _set("init_inputs", to=["/dev/zero"])),
    ("tokenizer_config.json", _set("gguf_file", to="/dev/zero")),
    ("tokenizer_config.json", _set("fast_tokenizer_files", to=["../../tokenizer.1.0.json"])),
    ("processor_config.json", _set("auto_map", to={"AutoProcessor": "other/repository--code.P"})),
    ("processor_config.json", _set("processor_class", to="AutoProcessor")),
    ("processor_config.json", _set("image_processor", "image_processor_type", to="TimmWrapperImageProcessor")),
    ("processor_config.json", _set("image_processor", "auto_map", to={"AutoImageProcessor": "code.I"})),
    ("processor_config.json", _set("image_processor", "size", "shortest_edge", to=10**12)),
    ("processor_config.json", _set("image_processor", "patch_size", to=10**9)),
    ("video_preprocessor_config.json", _set("video_processor_type", to="OtherVideoProcessor")),
]


@pytest.mark.parametrize(("name", "change"), SETTINGS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(SETTINGS)])
def test_what_export_does_not_write_is_refused(exported, tmp_path, name, change):
    folder = edited(exported("qwen2_vl"), tmp_path / "model", name, change)
    assert str(folder / name) in refusal(folder)
    assert not (tmp_path / "outside").exists()


MODULES = [
    _set("2", "type", to="os.system"),
    _set("2", "type", to="sentence_transformers.models.StaticEmbedding"),
    _set("2", "type", to="sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    _set("1", "path", to="../1_Pooling"),
    _set("1", "path", to="/etc"),
    _set("0", "kwargs", to=["x"]),
    _set("1", "type", to="sentence_transformers.base.modules.transformer.Transformer"),
]


@pytest.mark.parametrize("change", MODULES)
def test_other_modules_are_refused(exported, tmp_path, change):
    def by_number(modules):
        keyed = {str(number): module for number, module in enumerate(modules)}
        change(keyed)

    folder = edited(exported("qwen2_vl"), tmp_path / "model", "modules.json", by_number)
    assert "modules.json" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'"x"', b"null"])
def test_a_damaged_file_of_settings_is_one_line(exported, tmp_path, name, content):
    folder = copied(exported("qwen2_vl"), tmp_path / "model")
    (folder / name).write_bytes(content)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors", "chat_template.jinja", "x.json"])
def test_what_never_ends_is_not_opened(exported, tmp_path, name):
    for kind in ("fifo", "zero", "nothing"):
        folder = copied(exported("qwen2_vl"), tmp_path / kind)
        (folder / name).unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(folder / name)
        else:
            (folder / name).symlink_to("/dev/zero" if kind == "zero" else "nowhere")
        assert str(folder / name) in refusal(folder)


@pytest.fixture(scope="module")
def behind(exported, tmp_path_factory):
    """A folder with every known module behind pooling, one of them by way of a router."""
    stock = SentenceTransformer(str(exported("qwen2_vl")), device="cpu")
    torch.manual_seed(0)
    parts = [Dense(32, 8, activation_function=torch.nn.Identity()), LayerNorm(8), Dropout(0.5)]
    router = Router(
        {"query": [Dense(8, 8)], "document": [Normalize()]}, default_route="document", allow_empty_key=False
    )
    folder = tmp_path_factory.mktemp("behind") / "model"
    model = SentenceTransformer(modules=[stock[0], stock[1], *parts, router, Normalize()]).eval()
    model.save(str(folder))
    return folder, model.encode_query(TEXTS), model.encode_document(TEXTS)


def test_modules_behind_pooling_are_loaded(behind):
    folder, queries, documents = behind
    model = Gen2Embed(folder, device="cpu")
    assert np.abs(model.encode_query([{"text": text} for text in TEXTS]) - queries).max() < 1e-6
    assert np.abs(model.encode_document([{"text": text} for text in TEXTS]) - documents).max() < 1e-6
    assert np.abs(queries - documents).max() > 0.1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("2_Dense/config.json", _set("activation_function", to="torch.hub.load")),
        ("2_Dense/config.json", _set("out_features", to=10**9)),
        ("3_LayerNorm/config.json", _set("dimension", to=10**9)),
        ("4_Dropout/config.json", _set("dropout", to="0.5")),
        ("5_Router/router_config.json", _set("types", "query_0_Dense", to="os.system")),
        ("5_Router/router_config.json", _set("types", "../../x", to="sentence_transformers.models.Dense")),
        ("5_Router/router_config.json", _set("structure", "query", to=["nowhere"])),
        ("5_Router/router_config.json", _set("parameters", "route_mappings", to={"(" * 10**5: "query"})),
        ("5_Router/query_0_Dense/config.json", _set("activation_function", to="torch.hub.load")),
    ],
)
def test_modules_behind_pooling_are_checked(behind, tmp_path, name, change):
    folder = edited(behind[0], tmp_path / "model", name, change)
    assert str(folder / name) in refusal(folder)


def test_pickled_weights_of_a_module_are_not_read(behind, tmp_path):
    folder = copied(behind[0], tmp_path / "model")
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save({"x": WriteFile(tmp_path / "proof")}, folder / "2_Dense" / "pytorch_model.bin")
    assert "pickled weights are not read" in refusal(folder)
    assert not (tmp_path / "proof").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _lost(weights):
    del weights[next(name for name in weights if "layers.1.mlp.down_proj" in name)]


def _one_more(weights):
    weights["language_model.layers.9.mlp.down_proj.weight"] = torch.ones(2, 2)


def _reshaped(weights):
    name = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[name] = weights[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "reason"), [(_lost, "missing"), (_one_more, "1 unexpected"), (_reshaped, "of another shape")]
)
@pytest.mark.parametrize("which", ["base", "exported"])
def test_weights_that_are_not_the_architectures_are_refused(
    tiny_dir, exported, tmp_path, monkeypatch, *, which, change, reason
):
    folder = reweighted((tiny_dir if which == "base" else exported)("qwen2_vl"), tmp_path / "model", change)
    said = refusal(folder)
    assert reason in said
    assert "mlp.down_proj.weight" in said
    monkeypatch.setenv("GEN2EMBED_MODEL", str(folder))
    with pytest.raises(ModelFolderError, match=reason):
        SentenceTransformer("gen2embed", device="cpu")


def test_a_lost_tensor_is_found_though_another_makes_up_for_its_size(tiny_dir, tmp_path):
    def change(weights):
        _lost(weights)
        weights["other"] = torch.ones(32, 64)

    said = refusal(reweighted(tiny_dir("qwen2_vl"), tmp_path / "model", change))
    assert "1 missing ['language_model.layers.1.mlp.down_proj.weight'], 1 unexpected ['other']" in said


def test_the_output_layer_of_a_generative_model_is_no_fault(tiny_dir, tiny, tmp_path):
    def change(weights):
        weights["lm_head.weight"] = torch.ones(891, 32)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model = Gen2Embed(reweighted(tiny_dir("qwen2_vl"), tmp_path / "model", change), device="cpu")
    assert np.abs(model.encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6


def test_sharded_weights(tiny_dir, tiny, tmp_path):
    folder = copied(tiny_dir("qwen2_vl"), tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    model = Gen2Embed(folder, device="cpu")
    assert np.abs(model.encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6
    (folder / "b.safetensors").rename(tmp_path / "b.safetensors")
    assert "b.safetensors not found" in refusal(folder)
    for elsewhere in ("../b.safetensors", str(tmp_path / "b.safetensors"), "b.bin"):
        index["weight_map"] = {
            name: elsewhere if shard == "b.safetensors" else shard for name, shard in index["weight_map"].items()
        }
        path.write_text(json.dumps(index))
        assert "is not the name of a safetensors file beside it" in refusal(folder)
        index["weight_map"] = {name: shard for shard, part in shards.items() for name in part}


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}x", b'\x0b\0\0\0\0\0\0\0{"a":[1,2]}'])
def test_a_damaged_file_of_weights_is_one_line(tiny_dir, tmp_path, content):
    folder = copied(tiny_dir("qwen2_vl"), tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (content, whole[:-1], whole + b"x", whole[:100]):
        path.write_bytes(damaged)
        assert f"{path}: not a whole safetensors file" in refusal(folder)
        with pytest.raises(ModelFolderError):
            read_header(path)


def test_every_kind_of_difference_is_named(tmp_path):
    found = {
        "missing_keys": {"a"},
        "unexpected_keys": {"b", "lm_head.weight"},
        "mismatched_keys": {("c", (1, 2), (2, 1))},
    }
    with pytest.raises(
        ModelFolderError, match=r"1 missing \['a'\], 1 unexpected \['b'\], 1 .*c \(1, 2\) instead of \(2, 1\)"
    ):
        check_keys(Source("x", tmp_path, None), torch.nn.Linear(1, 1), found)


# ---------------------------------------------------------------------------------------------------------------------
# Ordinary folders


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_keys_of_hub_folders_are_read(tiny_dir, tiny, tmp_path, family):
    """As published configurations have them."""

    def config(settings):
        settings |= {"_name_or_path": "someone/else", "torch_dtype": "float32", "attn_implementation": "sdpa"}
        settings |= {"max_window_layers": 28, "transformers_version": "4.41.2", "vision_feature_layer": -2}
        settings.pop("dtype", None)

    def tokenizer(settings):
        settings |= {
            "trust_remote_code": False,
            "chat_template": "{{ 1 }}",
            "tokenizer_file": "/elsewhere",
            "legacy": True,
        }

    folder = edited(tiny_dir(family), tmp_path / "one", "config.json", config)
    folder = edited(folder, tmp_path / "two", "tokenizer_config.json", tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "someone/code", "temperature": 0.01}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    model = Gen2Embed(folder, device="cpu")
    assert type(model[0]) is Transformer
    assert np.abs(model.encode_query(TEXTS) - tiny(family).encode_query(TEXTS)).max() < 1e-6


def test_what_the_caller_says_in_python_is_done(tiny_dir):
    options = {"attn_implementation": "eager", "dtype": "bfloat16"}
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", model_kwargs=options)
    assert (model[0].model.config._attn_implementation, model.dtype) == ("eager", torch.bfloat16)


def test_an_earlier_versions_paths_of_modules_are_known(exported, tiny, tmp_path):
    def earlier(modules):
        for module, name in zip(modules, ("Transformer", "Pooling", "Normalize"), strict=True):
            module["type"] = f"sentence_transformers.models.{name}"

    folder = edited(exported("qwen2_vl"), tmp_path / "model", "modules.json", earlier)
    model = Gen2Embed(folder, device="cpu")
    assert [type(module) for module in model] == [Transformer, Pooling, Normalize]
    assert np.abs(model.encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6


def test_a_template_of_the_folders_own_is_not_run(exported, tiny, tmp_path, monkeypatch):
    """Its first line says the prompt; what follows is this version's template."""
    folder = copied(exported("qwen2_vl"), tmp_path / "model")
    path = folder / "chat_template.jinja"
    first = path.read_text().splitlines()[0]
    path.write_text(first + "\n{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}")
    monkeypatch.setenv("GEN2EMBED_MODEL", str(folder))
    for model in (Gen2Embed(folder, device="cpu"), SentenceTransformer("gen2embed", device="cpu")):
        assert np.abs(model.encode_query(TEXTS) - tiny("qwen2_vl").encode_query(TEXTS)).max() < 1e-6


def test_padding_in_a_tokenizers_file_is_taken_out(exported, tiny, tmp_path, monkeypatch):
    def change(state):
        state["padding"] = {"strategy": {"Fixed": 5000}, "direction": "Left", "pad_to_multiple_of": None}
        state["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}

    folder = edited(exported("qwen2_vl"), tmp_path / "model", "tokenizer.json", change)
    monkeypatch.setenv("GEN2EMBED_MODEL", str(folder))
    for model in (Gen2Embed(folder, device="cpu"), SentenceTransformer("gen2embed", device="cpu")):
        assert model.tokenizer.backend_tokenizer.padding is None


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/model", "nowhere", "~/no/such/folder", "a/b/c", "no where/x", ""]
)
def test_a_missing_folder_is_called_so(name, tiny_dir):
    for said in (refusal(name), refusal(tiny_dir("qwen2_vl"), adapter=name)):
        assert said.startswith("no such folder: ")
        assert repr(name) in said


def test_what_could_be_either_says_both(tiny_dir):
    for said in (refusal("nowhere/model"), refusal(tiny_dir("qwen2_vl"), adapter="nowhere/model")):
        assert said.startswith("no such folder: 'nowhere/model'")
        assert "cannot be had from the hub" in said


def test_a_file_is_no_folder(tiny_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for said in (refusal(tmp_path / "file"), refusal(tiny_dir("qwen2_vl"), adapter=tmp_path / "file")):
        assert "is a file, not the folder" in said
    assert "no config.json" in refusal(tmp_path)
    assert "adapter_config.json not found" in refusal(tiny_dir("qwen2_vl"), adapter=tmp_path)


def test_home_is_understood(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_dir("qwen2_vl"))
    assert Gen2Embed("~/model", device="cpu").get_embedding_dimension() == 32


# ---------------------------------------------------------------------------------------------------------------------
# The hub's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    import huggingface_hub.constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_models_in_the_hubs_cache_load_as_they_do_from_a_folder(tiny_dir, exported, tiny, cache, tmp_path, *, family):
    want = tiny(family).encode_query(TEXTS)
    for hub_id, folder in (("org/base", tiny_dir(family)), ("org/exported", exported(family))):
        in_hub_cache(folder, cache, hub_id)
        model = Gen2Embed(hub_id, device="cpu", cache_folder=str(cache))
        assert np.abs(model.encode_query(TEXTS) - want).max() < 1e-6
        assert model[0].model.config.name_or_path == hub_id
        assert find(hub_id, cache_dir=str(cache)).revision == COMMIT


def test_models_in_the_hubs_cache_are_checked(hostile, tiny_dir, cache):
    folder, proof = hostile
    in_hub_cache(folder, cache, "org/hostile")
    assert "model_kwargs" in refusal("org/hostile", cache_folder=str(cache))
    base = pickled(tiny_dir("qwen2_vl"), proof.parent / "pickled", proof)
    (base / "model.safetensors").unlink()
    in_hub_cache(base, cache, "org/pickled")
    assert "pytorch_model.bin is pickled" in refusal("org/pickled", cache_folder=str(cache))
    assert not proof.exists()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_in_a_process_of_its_own_by_the_variables_of_the_hub(hostile, exported, cache, tmp_path):
    """As a user has it: HF_HUB_CACHE and HF_HUB_OFFLINE, a hub id, a short name."""
    in_hub_cache(hostile[0], cache, "org/hostile")
    in_hub_cache(exported("qwen2_vl"), cache, "org/exported")
    program = (
        "import sys; import gen2embed_mteb; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer('gen2embed', device='cpu')\n"
        "print(model.encode_query(['a fox']).shape, type(model[0]).__name__, model.__dict__.get('_load_modules'))\n"
    )
    for hub_id, status in (("org/exported", 0), ("org/hostile", 1)):
        env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "GEN2EMBED_MODEL": hub_id}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**env, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert ("(1, 32) Transformer None" in done.stdout) == (status == 0)
    assert not hostile[1].exists()


def test_a_chat_template_is_a_text_or_texts_by_name(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for wrong in (5, [1, 2], [{"name": "default"}], {"default": 5}, [{"name": 1, "template": "a"}]):
        path.write_text(json.dumps({**settings, "chat_template": wrong}))
        with pytest.raises(Gen2EmbedError, match=r"tokenizer_config\.json: chat_template is neither a text nor texts"):
            Gen2Embed(folder, device="cpu")


def test_a_template_that_is_not_utf_8_is_named(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfea")
    with pytest.raises(Gen2EmbedError, match=r"chat_template\.jinja: not a text in UTF-8"):
        Gen2Embed(folder, device="cpu")
