"""The records of the families: what they state is what transformers' own classes do."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image
from tiny_models import FAMILIES as NAMES
from vllm_rule import content_format

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.families import FAMILIES, chat_template, check_layout, family_of, prompt_of
from gen2embed_mteb.embedder.prompts.strategies import STRATEGIES


def test_the_families_written_by_hand_are_known():
    assert {family.model_type: family.name for family in FAMILIES.values()} == {
        "qwen2_vl": "Qwen2-VL",
        "qwen2_5_vl": "Qwen2.5-VL",
        "qwen3_vl": "Qwen3-VL",
        "llava_next": "LLaVA-NeXT",
        "phi3_v": "Phi-3.5-V",
    }


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_prompt_can_be_read_back_from_a_template(name, layout):
    for family in FAMILIES.values():
        assert prompt_of(chat_template(family, STRATEGIES[name], layout)) == STRATEGIES[name]


@pytest.mark.parametrize("layout", ["native", "official"])
def test_vllm_knows_that_the_content_is_a_list_of_parts(layout):
    for family in FAMILIES.values():
        assert content_format(chat_template(family, STRATEGIES["hierarchical"], layout)) == "openai"


def test_no_prompt_is_read_from_another_s_template():
    assert prompt_of("{% for message in messages %}{{ message['content'] }}{% endfor %}") is None
    assert prompt_of("") is None


def test_any_other_type_gets_a_generic_record():
    family = family_of("some_new_model")
    assert family.is_generic
    assert (family.name, family.model_type) == ("some_new_model", "some_new_model")
    assert not any(known.is_generic for known in FAMILIES.values())
    with pytest.raises(ValueError, match="some_new_model has no template of ours"):
        chat_template(family, STRATEGIES["none"])


def test_the_official_layout_is_for_the_families_written_by_hand():
    for family in FAMILIES.values():
        check_layout(family, "official")
    with pytest.raises(ValueError, match=r"'some_new_model': .*llava_next, phi3_v, qwen2_5_vl, qwen2_vl, qwen3_vl"):
        check_layout(family_of("some_new_model"), "official")


def test_a_type_without_a_chat_template_is_refused(tmp_path):
    """An encoder such as BERT has none."""
    from tiny_tokenizers import byte_level
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = byte_level([], {}, None)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        Gen2Embed(tmp_path)


def test_an_unknown_layout_is_refused_with_the_known_ones(tiny_dir):
    with pytest.raises(ValueError, match="unknown image layout 'both'; known: native, official"):
        Gen2Embed(tiny_dir("qwen2_vl"), layout="both")


@pytest.mark.parametrize("name", NAMES)
def test_the_native_marker_is_the_processors_own(tiny, name):
    """Whatever the record says an image is, the processor must find exactly one image token in it."""
    processor = tiny(name).processor
    assert FAMILIES[name].image.count(processor.image_token) == 1
    assert FAMILIES[name].bare_image == processor.image_token


@pytest.mark.parametrize("name", NAMES)
def test_lora_targets_exist_in_the_language_model(tiny, name):
    names = {key.rpartition(".")[2] for key, _ in tiny(name)[0].model.language_model.named_modules()}
    assert set(FAMILIES[name].lora_targets) <= names


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_3d_where_the_record_says_so(tiny, name):
    assert ("mm_token_type_ids" in tiny(name).preprocess([Image.new("RGB", (64, 64))])) is FAMILIES[name].mrope


@pytest.mark.parametrize("name", NAMES)
def test_template_files_may_be_missing_from_the_base(tiny_dir, tmp_path, name):
    """A base model's own template, or the lack of one, makes no difference."""
    shutil.copytree(tiny_dir(name), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ raise_exception('the stock template was used') }}")
    assert Gen2Embed(tmp_path / "base").render("a fox", "query") == Gen2Embed(tiny_dir(name)).render("a fox", "query")
