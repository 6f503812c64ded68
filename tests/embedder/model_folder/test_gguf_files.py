"""GGUF files: the checks before reading, and a small one that is read, encoded with, and saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.cli import main
from gen2embed_mteb.embedder.model_folder.gguf_files import check_gguf
from gen2embed_mteb.errors import Gen2EmbedError

HAS_GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="the package gguf is not installed")
NAME = "model.gguf"


def refusal(folder: Path, name: str) -> str:
    with pytest.raises(Gen2EmbedError) as error:
        check_gguf(folder, name)
    with pytest.raises(Gen2EmbedError) as other:
        Gen2Embed(folder, gguf_file=name, device="cpu")
    assert str(error.value) == str(other.value)
    return str(error.value)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(b"GGML")
    (tmp_path / "other.gguf").mkdir()
    assert "'../model.gguf'; pass the name of a .gguf file" in refusal(tmp_path, "../model.gguf")
    assert "'model.bin'; pass the name" in refusal(tmp_path, "model.bin")
    assert "absent.gguf not found (GGUF files there: model.gguf, other.gguf)" in refusal(tmp_path, "absent.gguf")
    assert "other.gguf not found" in refusal(tmp_path, "other.gguf")
    assert "not a GGUF file" in refusal(tmp_path, NAME)


@pytest.mark.skipif(HAS_GGUF, reason="the package gguf is installed")
def test_the_missing_package_is_named(tmp_path):
    (tmp_path / NAME).write_bytes(b"GGUF")
    assert "pip install 'gen2embed[gguf]'" in refusal(tmp_path, NAME)


def test_an_exported_model_takes_no_gguf_file(exported):
    with pytest.raises(Gen2EmbedError, match="is an exported model"):
        Gen2Embed(exported("qwen2_vl"), gguf_file=NAME, device="cpu")


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Queries and keys of a Llama as llama.cpp stores them: the two halves of a head interleaved."""
    width = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, width, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


@pytest.fixture(scope="module")
def gguf_folder(tiny_dir, tmp_path_factory):
    """The tiny Llama in float32, written with the package gguf: same weights, same tokenizer."""
    gguf = pytest.importorskip("gguf")
    source = tiny_dir("llama")
    config = json.loads((source / "config.json").read_text())
    core = json.loads((source / "tokenizer.json").read_text())
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / NAME, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = core["model"]["vocab"]
    special = {token["id"]: token["content"] for token in core["added_tokens"]}
    tokens = [""] * config["vocab_size"]
    for text, number in {**vocabulary, **{text: number for number, text in special.items()}}.items():
        tokens[number] = text
    tokens = [text or f"[unused{number}]" for number, text in enumerate(tokens)]
    kinds = [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in core["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<|begin_of_text|>"])
    writer.add_eos_token_id(vocabulary["<|eot_id|>"])
    writer.add_pad_token_id(0)
    writer.add_chat_template((source / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        stem, _, ending = name.rpartition(".")
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        if (part := stem.rpartition(".")[2]) in heads:
            tensor = rotated(tensor, heads[part])  # noqa: PLW2901 # the same one, in the file's layout
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", tensor.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@needs_gguf
@pytest.mark.slow
def test_a_gguf_file_gives_the_vectors_of_its_weights(gguf_folder, tiny_dir, tmp_path):
    model = Gen2Embed(gguf_folder, gguf_file=NAME, device="cpu")
    same = Gen2Embed(tiny_dir("llama"), device="cpu")
    texts = ["a red fox", "a <|eot_id|> b"]
    assert model.render(texts[0], "query") == same.render(texts[0], "query")
    ours, theirs = (one[0].model.state_dict() for one in (model, same))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model.save_pretrained(str(tmp_path / "saved"))
    saved = Gen2Embed(tmp_path / "saved", device="cpu")
    assert np.abs(saved.encode_query(texts) - model.encode_query(texts)).max() < 1e-6
    assert not [path for path in (tmp_path / "saved").glob("*.json") if "gguf" in path.read_text()]


@needs_gguf
@pytest.mark.slow
def test_export_takes_a_gguf_file(gguf_folder, tmp_path):
    assert main(["export", str(gguf_folder), str(tmp_path / "out"), "--gguf-file", NAME, "--device", "cpu"]) == 0
    assert Gen2Embed(tmp_path / "out", device="cpu").encode_query(["a fox"]).shape == (1, 32)


@needs_gguf
@pytest.mark.slow
def test_train_takes_a_gguf_file(gguf_folder, tiny_dir, tmp_path):
    """The adapter is the one that is trained on the same weights as safetensors."""
    pairs = [{"anchor": f"a {word}", "positive": f"the {word}"} for word in ("red fox", "cat", "dog", "owl")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sample = ["sample", "--data_dir", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "sampled")]
    assert main([*sample, "--method", "in-batch"]) == 0
    flags = ["--processed_data_path", str(tmp_path / "sampled"), "--max_steps", "2", "--batch_size", "2", "--use_cpu"]
    flags += ["--save_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--learning_rate", "0.01"]
    runs = {"gguf": [str(gguf_folder), "--gguf_file", NAME], "plain": [str(tiny_dir("llama"))]}
    for name, model in runs.items():
        assert main(["train", "--model_name", *model, "--output_dir", str(tmp_path / name), *flags]) == 0
    found, expected = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in runs)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    merged = Gen2Embed(tmp_path / "gguf", device="cpu")
    adapted = Gen2Embed(tmp_path / "gguf" / "adapter", gguf_file=NAME, device="cpu")
    texts = ["a red fox", "an owl"]
    assert np.abs(merged.encode_query(texts) - adapted.encode_query(texts)).max() < 1e-5
    base = Gen2Embed(gguf_folder, gguf_file=NAME, device="cpu")
    assert np.abs(merged.encode_query(texts) - base.encode_query(texts)).max() > 1e-3
    with pytest.raises(Gen2EmbedError, match=rf"--gguf_file {NAME}"):
        Gen2Embed(tmp_path / "gguf" / "adapter", device="cpu")


def test_a_folder_with_gguf_files_alone_names_the_flag(tmp_path):
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(Gen2EmbedError, match=r"GGUF files \(a\.gguf, b\.gguf\); .* --gguf_file a\.gguf"):
        Gen2Embed(tmp_path, device="cpu")
