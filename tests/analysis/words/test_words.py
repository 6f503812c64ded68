"""The one word: the probabilities are those of the embedding's own state under the output layer."""

from typing import Any

import numpy as np
import pytest
import torch

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.analysis.inputs import AskedInput
from gen2embed_mteb.analysis.options import WordsOptions
from gen2embed_mteb.analysis.words.picture import picture, wrapped
from gen2embed_mteb.analysis.words.run import analyze_words, next_tokens, open_words, shown, text_table
from gen2embed_mteb.errors import Gen2EmbedError


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "llama"])
def test_the_tokens_are_those_of_the_embeddings_own_state(tiny: Any, pictures: Any, family: str) -> None:
    model: Gen2Embed = tiny(family)
    given = {"text": "a red circle"} | ({"image": pictures[0]} if model.takes_images else {})
    found = next_tokens(model, given, "query", 4)
    features = model[0].forward(model.preprocess([given], task="query"))
    state = features["token_embeddings"][0, int(features["attention_mask"][0].sum()) - 1]
    expected = (model.generator.model.get_output_embeddings()(state)).softmax(-1).topk(4)
    assert [token.probability for token in found] == pytest.approx(expected.values.tolist(), abs=1e-6)
    assert [token.text for token in found] == [model.tokenizer.decode([one]) for one in expected.indices.tolist()]
    cosine = torch.cosine_similarity(state, torch.tensor(model.encode_query([given])[0]), dim=0)
    assert float(cosine.detach()) == pytest.approx(1, abs=1e-5)


def test_a_readout_changes_the_embedding_and_not_the_word(tiny: Any) -> None:
    given = {"text": "a red circle"}
    plain, other = (tiny("llama", readout=name) for name in (None, "pre-mlp"))
    assert np.abs(plain.encode_query([given]) - other.encode_query([given])).max() > 1e-3
    assert next_tokens(plain, given, "query", 3) == next_tokens(other, given, "query", 3)


def test_one_input_under_two_prompts(tiny_dir: Any) -> None:
    model = Gen2Embed(tiny_dir("llama"), device="cpu")
    options = WordsOptions(text="a red <circle>", prompts=("none", "hierarchical"), top=3)
    result = analyze_words(model, options, open_words(options))
    assert result.prompts == ("none", "hierarchical")
    assert [len(tokens) for tokens in result.tokens[0]] == [3, 3]
    assert result.tokens[0][0] != result.tokens[0][1]
    assert result.tokens[0][1] == next_tokens(model, {"text": "a red <circle>"}, "query", 3)
    drawn = picture(result).svg()
    assert "hierarchical" in drawn and "&lt;circle&gt;" in drawn
    assert "a red <circle>" in text_table(result)


def test_options_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(Gen2EmbedError, match="lens, whose texts differ by dataset"):
        WordsOptions(prompts=("lens",))
    with pytest.raises(Gen2EmbedError, match="name each once"):
        WordsOptions(prompts=("none", "none"))
    with pytest.raises(Gen2EmbedError, match="leave one out"):
        WordsOptions(text="a", subsets=("OK-VQA",))


def test_blanks_of_tokens_can_be_seen_and_long_texts_are_cut_into_lines() -> None:
    assert [shown(text) for text in (" a", "\n", "")] == ["·a", "\\n", "(nothing)"]
    lines = wrapped("one two three four five six seven eight nine ten", 80, 12, 3)
    assert len(lines) == 3 and lines[2].endswith("…")
    assert " ".join(lines[:2]) in "one two three four five six"
    assert AskedInput("", "query", {"text": "<|image_1|>\n a"}).text == "a"
