"""What the rows of a mini-batch begin with is run once, and gives the gradients of running it in every row."""

import pytest
import torch
from gradients import gradients, picture
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from tiny_models import FAMILIES

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.families import family_of
from gen2embed_mteb.embedder.model_folder.adapters import new_adapter
from trainers import SahaLoss
from trainers.loss.prefix_sharing import can_share_prefix, gains_from_sharing, num_shared, sharing_prefix


def features_of(model, padding_side="right"):
    """Six pairs in mini-batches of three: texts; images with an instruction; labels; a text and images."""
    queries = ["a text", "another one of them", "a", *({"text": "find it", "image": picture(n)} for n in range(3))]
    positives = ["dog", "dog", "dog", "a caption", {"image": picture(4)}, {"image": picture(5)}]
    padding = {"text": {"padding_side": padding_side}}
    return [
        model.preprocess(column, task=task, processing_kwargs=padding)
        for column, task in ((queries, "query"), (positives, "document"))
    ]


def count_tokens(model):
    """(rows, tokens) of every call of the first layer of the decoder."""
    calls = []
    layer = model[0].model.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape[:2])))
    return calls


@pytest.fixture(params=FAMILIES)
def model(request, tiny_dir):
    model = Gen2Embed(tiny_dir(request.param), device="cpu").train()
    torch.manual_seed(0)  # before the adapter: its A is drawn
    new_adapter(model[0].model, family_of(model[0].config.model_type).lora_targets, dropout=0.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def test_gradients_are_those_of_the_stock_loss(model):
    model.double()  # so that the bound is on the method, and not on the order in which a processor adds
    stock = CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=3)
    calls = count_tokens(model)
    expected_value = stock(features_of(model), None)
    expected = gradients(model, expected_value)
    full = sum(rows * tokens for rows, tokens in calls)
    calls.clear()
    # The stock loss knows no equal positives: here they are negatives of each other.
    value = SahaLoss(model, mini_batch_size=3, mask_equal_positives=False)(features_of(model))
    found = gradients(model, value)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-6)
    assert found.keys() == expected.keys() and found
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * largest, name
    assert [rows for rows, _ in calls[:2]] == [1, 3]
    assert sum(rows * tokens for rows, tokens in calls) < 0.8 * full
    assert "forward" not in vars(model[0].model.language_model)


def test_states_are_those_of_the_full_forward(model):
    for features in features_of(model):
        kwargs = {
            name: value
            for name, value in features.items()
            if torch.is_tensor(value) and name != "num_images_per_sample"
        }
        with torch.no_grad():
            full = model[0].model(**kwargs).last_hidden_state
            with sharing_prefix(model[0].model):
                shared = model[0].model(**kwargs).last_hidden_state
        mask = features["attention_mask"].bool()
        assert shared.shape == full.shape
        assert torch.allclose(shared[mask], full[mask], atol=1e-5)


def test_switched_off_and_on(model):
    calls = count_tokens(model)
    SahaLoss(model, mini_batch_size=3, share_prefix=False)(features_of(model)).backward()
    assert {rows for rows, _ in calls} == {3}
    calls.clear()
    SahaLoss(model, mini_batch_size=3, share_prefix=True)(features_of(model)).backward()
    assert {rows for rows, _ in calls} == {1, 3}


def test_dropout_is_not_shared_unless_asked_for(model):
    inner = model[0].model
    assert gains_from_sharing(inner)
    inner.language_model.layers[0].add_module("extra", torch.nn.Dropout(0.1))
    assert not gains_from_sharing(inner)
    calls = count_tokens(model)
    SahaLoss(model, mini_batch_size=3)(features_of(model)).backward()
    assert {rows for rows, _ in calls} == {3}
    calls.clear()
    SahaLoss(model, mini_batch_size=3, share_prefix=True)(features_of(model)).backward()
    assert {rows for rows, _ in calls} == {1, 3}
    model.eval()
    assert gains_from_sharing(inner)


def test_checkpointed_activations_forbid_it(model):
    inner = model[0].model
    assert can_share_prefix(inner)
    inner.gradient_checkpointing_enable()
    assert not can_share_prefix(inner)
    calls = count_tokens(model)
    SahaLoss(model, mini_batch_size=3, share_prefix=True)(features_of(model)).backward()
    assert {rows for rows, _ in calls} == {3}


def test_rows_padded_on_the_left_do_not_share(model):
    calls = count_tokens(model)
    expected = SahaLoss(model, mini_batch_size=3, share_prefix=False)(features_of(model, "left"))
    found = SahaLoss(model, mini_batch_size=3)(features_of(model, "left"))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    # The three image queries are the longest of their column, so padding does not move them.
    assert [rows for rows, _ in calls].count(1) == 1


def test_num_shared_by_hand():
    states = torch.tensor([[1.0, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 0]])[..., None]
    assert num_shared(inputs_embeds=states) == 2
    assert num_shared(inputs_embeds=states[:1]) == 0
    assert num_shared(inputs_embeds=states[[0, 0]]) == 3  # the last token of the longest row is never shared
    assert num_shared(inputs_embeds=states, attention_mask=torch.tensor([[1] * 4, [1] * 4, [1, 0, 0, 0]])) == 1
    assert num_shared(inputs_embeds=states, attention_mask=torch.tensor([[0, 1, 1, 1]] * 3)) == 0
    positions = torch.arange(4).repeat(3, 3, 1)
    assert num_shared(inputs_embeds=states, position_ids=positions) == 2
    positions[2, 1, 1] = 7
    assert num_shared(inputs_embeds=states, position_ids=positions) == 1
    assert num_shared(inputs_embeds=states, visual_pos_masks=torch.tensor([[0, 1, 0, 0]] * 3).bool()) == 1
    assert num_shared(inputs_embeds=states, past_key_values=object()) == 0
    assert num_shared(inputs_embeds=states, something_new=1) == 0
    assert num_shared(inputs_embeds=states, something_new=None) == 2
