"""A base model and its adapter for vLLM: under the names that it knows, and refused where it would apply a part."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from serving import check_server, vllm_server

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.cli import main
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter, save_adapter
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.serving.http_client import EmbeddingServer
from gen2embed_mteb.serving.lora import _servable, export_for_vllm

TEXTS = ["a red circle", "two green squares beside a wall"]


def trained(base: Any, folder: Path, *, spread: float = 0.2, **settings: Any) -> Path:
    """An adapter with weights that matter, as after training."""
    model = Gen2Embed(base, device="cpu", **settings.pop("loading", {}))
    inner = model[0].model
    given = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["q_proj", "down_proj"], "dora": False, **settings}
    new_adapter(inner, **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    save_adapter(inner, folder)
    return folder


def test_names_are_those_of_the_generation_model_and_vectors_those_of_the_adapter(
    tiny_dir: Any, tmp_path: Path
) -> None:
    adapter = trained(tiny_dir("qwen2_vl"), tmp_path / "adapter", loading={"prompt_mode": "e5-v"})
    made = export_for_vllm(
        tiny_dir("qwen2_vl"), tmp_path / "base", tmp_path / "tuned", adapter=adapter, prompt_mode="e5-v", device="cpu"
    )
    assert made.flags == f"--enable-lora --max-lora-rank 8 --lora-modules tuned={tmp_path / 'tuned'}"
    written = load_file(made.adapter / "adapter_model.safetensors")
    own = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in written
    assert len(written) == len(own)
    for name, value in own.items():
        assert torch.equal(written[name.replace("base_model.model.", "base_model.model.model.", 1)], value)
    base, merged = (
        Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", prompt_mode="e5-v", adapter=a) for a in (None, adapter)
    )
    served = Gen2Embed(made.base, device="cpu")
    assert served.prompt == base.prompt
    assert np.array_equal(served.encode_query(TEXTS), base.encode_query(TEXTS))
    again = Gen2Embed(made.base, device="cpu", adapter=made.adapter)
    assert np.array_equal(again.encode_query(TEXTS), merged.encode_query(TEXTS))
    assert not np.allclose(again.encode_query(TEXTS), base.encode_query(TEXTS), atol=0.01)


REFUSED = {
    "DoRA": ({"dora": True}, "it is a DoRA adapter"),
    "rank": ({"rank": 600}, "its rank 600 is above 512"),
    "readout": ({"loading": {"readout": "pre-mlp"}, "targets": ["q_proj"]}, "readout='pre-mlp'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_would_apply_in_part_is_refused_before_anything_is_written(
    case: str, tiny_dir: Any, tmp_path: Path
) -> None:
    settings, reason = REFUSED[case]
    adapter = trained(tiny_dir("qwen2_vl"), tmp_path / "adapter", **settings)
    with pytest.raises(Gen2EmbedError, match=f"(?s){reason}.*merge it"):
        export_for_vllm(
            tiny_dir("qwen2_vl"), tmp_path / "base", tmp_path / "tuned", adapter=adapter, **settings.get("loading", {})
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_other_families_are_refused(tiny_dir: Any, tmp_path: Path) -> None:
    adapter = trained(tiny_dir("llama"), tmp_path / "adapter")
    with pytest.raises(Gen2EmbedError, match=r"model type 'llama'.*merge it"):
        export_for_vllm(tiny_dir("llama"), tmp_path / "base", tmp_path / "tuned", adapter=adapter)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("init_lora_weights", "pissa", "began as"), ("trainable_token_indices", [1], "trains tokens")],
)
def test_settings_that_vllm_does_not_apply_are_refused(
    key: str, value: Any, reason: str, tiny_dir: Any, tmp_path: Path
) -> None:
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu", adapter=trained(tiny_dir("qwen2_vl"), tmp_path / "a"))
    (config,) = model[0].model.peft_config.values()
    setattr(config, key, value)
    with pytest.raises(Gen2EmbedError, match=reason):
        _servable(model, "a")


def test_a_calibrated_base_is_refused(tiny_dir: Any, tmp_path: Path) -> None:
    adapter = trained(tiny_dir("qwen2_vl"), tmp_path / "adapter")
    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    texts = [f"a text with the number {n}" for n in range(120)]
    model.calibrate(texts[::2], texts[1::2])
    model.save_pretrained(str(tmp_path / "calibrated"))
    with pytest.raises(Gen2EmbedError, match="calibration, that do not belong to the adapter"):
        export_for_vllm(tmp_path / "calibrated", tmp_path / "base", tmp_path / "tuned", adapter=adapter, device="cpu")
    assert not (tmp_path / "base").exists()
    assert not (tmp_path / "tuned").exists()


def test_layers_outside_the_language_model_are_refused(tiny_dir: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")
    get_peft_model(model[0].model, LoraConfig(r=4, target_modules=["qkv", "q_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(Gen2EmbedError, match=r"visual\..*qkv.*no layer of the language model"):
        export_for_vllm(tiny_dir("qwen2_vl"), tmp_path / "base", tmp_path / "tuned", adapter=tmp_path / "a")


def test_the_command_says_how_to_serve_both(tiny_dir: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = trained(tiny_dir("qwen2_vl"), tmp_path / "adapter")
    base, tuned, command = tmp_path / "base", tmp_path / "tuned", ["export", str(tiny_dir("qwen2_vl"))]
    given = [*command, str(base), "--vllm_adapter", str(tuned), "--device", "cpu"]
    assert main([*given, "--adapter", str(adapter)]) == 0
    assert (
        f"vllm serve {base} --runner pooling --convert embed --enable-lora --max-lora-rank 8 --lora-modules tuned="
        in (capsys.readouterr().out)
    )
    both = ["--vllm_adapter", str(tmp_path / "y" / ".." / "x"), "--adapter", str(adapter)]
    for faulty, reason in (
        ([*command, str(tmp_path / "x"), *both], "would hold the base model as well"),
        ([*command, str(tmp_path / "x" / "base"), *both], "would hold the base model as well"),
        (given, "needs --adapter"),
        ([*given, "--check"], "leave one of them out"),
    ):
        assert main(faulty) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.exhaustive
@pytest.mark.skipif(not os.environ.get("GEN2EMBED_VLLM"), reason="GEN2EMBED_VLLM names no interpreter with vLLM")
def test_vllm_gives_the_vectors_of_the_merged_model_under_the_adapter_s_name(tmp_path: Path) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = trained("gen2embed-mini", tmp_path / "adapter", spread=0.1, targets=layers)
    made = export_for_vllm("gen2embed-mini", tmp_path / "base", tmp_path / "tuned", adapter=adapter, device="cpu")
    options = {"device": "cpu", "model_kwargs": {"dtype": "float32"}}
    merged, base = Gen2Embed(made.base, adapter=adapter, **options), Gen2Embed(made.base, **options)
    with vllm_server(os.environ["GEN2EMBED_VLLM"], made.base, made.flags.split()) as url:
        server = EmbeddingServer(url, timeout=120)
        assert check_server(server, merged, served_name="tuned").faults == []
        assert check_server(server, base).faults == []
        assert check_server(server, base, served_name="tuned").faults
