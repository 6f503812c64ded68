"""One pass gives the vectors of every readout: those of a model that was loaded with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import sample_of
from tiny_any import write_any
from tiny_models import write_tiny

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.passes.several_readouts import SeveralReadouts, open_readouts, possible_readouts, split
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.errors import Gen2EmbedError

ALL = tuple(Readout(state, norm) for state in ("last", "pre-mlp", "drop-1", "drop-2") for norm in (True, False))


def folder_of(family: str, where: Path) -> Path:
    return write_tiny(family, where) if family in ("qwen2_vl", "llava_next") else write_any(family, where)


def inputs_of(model: Gen2Embed) -> list[dict[str, Any]]:
    inputs: list[dict[str, Any]] = [{"text": "a red circle"}, {"text": "Find a page about the sea.\n"}]
    if model.takes_images:
        picture = Image.effect_noise((90, 60), 64).convert("RGB")
        inputs += [{"image": picture}, {"text": "What is it?", "image": picture}]
    return inputs


@pytest.mark.parametrize(
    "family", sample_of(["qwen2_vl", "llava_next", "llama", "gemma3_text", "idefics3"], ["qwen2_vl", "gemma3_text"])
)
@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_all_readouts_in_one_pass_are_those_of_models_loaded_with_them(
    family: str, reuse_prefix: bool, tmp_path: Path
) -> None:
    folder = folder_of(family, tmp_path / family)
    model = Gen2Embed(folder)
    layers = model[0].model.get_decoder().config.num_hidden_layers
    readouts = [one for one in ALL if one.num_dropped < layers]
    several = SeveralReadouts(model, readouts, reuse_prefix=reuse_prefix)
    inputs = inputs_of(model)
    for side in ("query", "document"):
        vectors = several.encode_prepared(side, several.prepare(side, inputs))
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        found = several.split(vectors)
        for one in readouts:
            single = PrefixEncoder(Gen2Embed(folder, readout=one.state, readout_norm=one.norm))
            expected = single.encode_prepared(side, single.prepare(side, inputs))
            np.testing.assert_allclose(found[one], expected, atol=2e-6, err_msg=one.name)


def test_the_model_is_as_it_was_afterwards(tmp_path: Path) -> None:
    model = Gen2Embed(write_any("llama", tmp_path / "llama"))
    before = model.encode_query(["a red circle"])
    several = SeveralReadouts(model, ALL[:4])
    several.encode_query([{"text": "a blue square"}])
    np.testing.assert_array_equal(model.encode_query(["a red circle"]), before)
    assert not any(module._forward_pre_hooks for module in model[0].model.modules())


def test_a_norm_that_centres_is_refused_without_it(tmp_path: Path) -> None:
    model = Gen2Embed(write_any("aya_vision", tmp_path / "aya"))
    with pytest.raises(Gen2EmbedError, match="final norm"):
        SeveralReadouts(model, [Readout(), Readout("last", norm=False)])


def test_a_layer_whose_mlp_runs_beside_its_attention_has_no_such_state(tmp_path: Path) -> None:
    model = Gen2Embed(write_any("aya_vision", tmp_path / "aya"))
    with pytest.raises(Gen2EmbedError, match="one readout at a time"):
        SeveralReadouts(model, [Readout("pre-mlp")])


def test_models_with_a_readout_or_names_given_twice_are_refused(tmp_path: Path) -> None:
    folder = write_any("llama", tmp_path / "llama")
    with pytest.raises(Gen2EmbedError, match="as it was published"):
        SeveralReadouts(Gen2Embed(folder, readout="pre-mlp"), [Readout()])
    with pytest.raises(Gen2EmbedError, match="texts per dataset"):
        SeveralReadouts(Gen2Embed(folder, prompt_mode="lens"), [Readout()])
    with pytest.raises(Gen2EmbedError, match="the last token"):
        SeveralReadouts(Gen2Embed(folder, prompt_mode="lens", pooling="phrase"), [Readout()])
    for readouts in ((), (Readout(), Readout())):
        with pytest.raises(Gen2EmbedError, match="name each once"):
            SeveralReadouts(Gen2Embed(folder), readouts)
    with pytest.raises(Gen2EmbedError, match="leaves none"):
        SeveralReadouts(Gen2Embed(folder), [Readout("drop-9")])


def test_possible_readouts_are_told_from_those_that_a_family_cannot_give(tmp_path: Path) -> None:
    model = Gen2Embed(write_any("aya_vision", tmp_path / "aya"))
    wanted = [Readout(), Readout("pre-mlp"), Readout("drop-1"), Readout("last", norm=False)]
    possible, refused = possible_readouts(model, wanted)
    assert possible == (Readout(), Readout("drop-1"))
    assert list(refused) == [Readout("pre-mlp"), Readout("last", norm=False)]
    inputs: list[dict[str, Any]] = [{"text": "a red circle"}, {"text": "the sea"}]
    several, single = open_readouts(model, possible), open_readouts(model, possible[:1])
    assert type(single) is PrefixEncoder
    found = split(several.encode_query(inputs), possible)
    np.testing.assert_allclose(found[Readout()], single.encode_query(inputs), atol=2e-6)
    np.testing.assert_allclose(split(single.encode_query(inputs), [Readout()])[Readout()], found[Readout()], atol=2e-6)


@pytest.mark.parametrize("readout", ALL)
def test_readouts_are_found_by_name(readout: Readout) -> None:
    assert Readout.named(readout.name) == readout
