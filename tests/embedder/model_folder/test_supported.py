"""Types that cannot be used are refused by their configuration, before a weight is read."""

from __future__ import annotations

import importlib.util

import pytest
import transformers

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder.supported import check_supported, processor_error
from gen2embed_mteb.errors import Gen2EmbedError


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("MllamaConfig", "'mllama' read images through cross-attention layers"),
        ("Llama4Config", r"'llama4' have no class without an output layer .*only Llama4ForConditionalGeneration"),
        ("T5Config", "'t5' have an encoder and a decoder"),
    ],
)
def test_a_type_is_refused_with_the_reason(tmp_path, kind, message):
    config = getattr(transformers, kind)()
    with pytest.raises(Gen2EmbedError, match=message):
        check_supported(config)
    # Nothing but the configuration is there: no weight was looked for.
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(Gen2EmbedError, match=message):
        Gen2Embed(tmp_path, device="cpu")


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config", "Gemma3Config", "Qwen2VLConfig", "LlavaConfig"])
def test_a_type_with_a_base_class_is_taken(kind):
    check_supported(getattr(transformers, kind)())


def test_every_type_whose_base_class_is_one_for_a_task_is_refused():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    tasks = {kind for kind, name in MODEL_MAPPING_NAMES.items() if "ForConditionalGeneration" in str(name)}
    assert "llama4" in tasks
    for kind in tasks & set(CONFIG_MAPPING.keys()):
        with pytest.raises(Gen2EmbedError, match=f"'{kind}'"):
            check_supported(CONFIG_MAPPING[kind]())


def test_a_missing_package_is_named():
    inner = ImportError("SmolVLMProcessor requires the num2words library but it was not found: `pip install num2words`")
    message = str(processor_error("some/model", inner))
    assert "some/model: its processor needs the package num2words: pip install num2words" in message
    outer = ValueError("cannot instantiate this processor")
    outer.__cause__ = ModuleNotFoundError("No module named 'timm'")
    assert "pip install timm" in str(processor_error("some/model", outer))


def test_an_error_that_does_not_name_torchvision():
    message = str(processor_error("m", TypeError("__init__() takes 3 positional arguments but 4 were given")))
    if importlib.util.find_spec("torchvision") is None:
        assert "does not load without torchvision: pip install 'gen2embed[image]'" in message
    assert "TypeError: __init__() takes 3" in message
