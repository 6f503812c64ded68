"""The generator writes what transformers writes, with the embedder's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from gen2embed_mteb.embedder.reranking.generation_model import generation_class

RED = Image.new("RGB", (64, 64), "red")


@pytest.mark.parametrize("family", ["llama", "qwen2_vl"])
def test_texts_and_scores_are_those_of_transformers(tiny, tiny_dir, family):
    model = tiny(family)
    loaded = generation_class(model[0].config)[1].from_pretrained(tiny_dir(family)).eval()
    text = {
        "llama": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "qwen2_vl": "<|im_start|>user\nWhat is red?<|im_end|>\n<|im_start|>assistant\n",
    }[family]
    ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        scores = loaded(input_ids=ids).logits[0, -1].log_softmax(0)
        written = loaded.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    # The second input is longer, so that the first one is padded.
    inputs = ["What is red?", "What is red, if one looks at it for a long time, and what is blue?"]
    assert torch.allclose(model.generator.next_token_scores(inputs)[0], scores, atol=1e-5)
    expected = model.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert model.generator.generate(inputs, max_new_tokens=5)[0] == expected


def test_the_miniature_describes_an_image():
    model = Gen2Embed("gen2embed-mini", device="cpu")
    with_image, without = model.generator.next_token_scores([RED, "red"])
    assert torch.allclose(with_image.exp().sum(), torch.tensor(1.0), atol=1e-4)
    assert not torch.allclose(with_image, without)
    assert len(model.generator.generate([{"text": "What color?", "image": RED}], max_new_tokens=3)) == 1


def test_adapters_take_part_or_not_and_are_left_as_they_were(tiny_dir):
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    plain = model.generator.next_token_scores(["a"])
    new_adapter(model[0].model, ["q_proj", "down_proj"], rank=2, dora=False, dropout=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model[0].model.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.1)
    vectors = model.encode(["a"])
    trained = [tensor.requires_grad for tensor in model[0].model.parameters()]
    adapted = model.generator.next_token_scores(["a"])
    assert (adapted - plain).abs().max() > 1e-3
    assert torch.equal(model.generator.next_token_scores(["a"], adapters=False), plain)
    assert model.generator.generate(["a"], adapters=False, max_new_tokens=2)
    assert torch.equal(model.generator.next_token_scores(["a"]), adapted)
    assert np.array_equal(model.encode(["a"]), vectors)
    assert [tensor.requires_grad for tensor in model[0].model.parameters()] == trained


def test_nothing_for_nothing(tiny):
    generator = tiny("llama").generator
    assert generator.generate([]) == []
    assert generator.next_token_scores([]).shape == (0, 384)
    with pytest.raises(TypeError, match=r"inputs must be a list of inputs, got the text 'abc'; pass \[text\]"):
        generator.generate("abc")
