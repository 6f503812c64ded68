"""The loss against an uncached reference written out by hand, in one process and in two; and what counts as equal."""

import numpy as np
import pytest
import torch
from gradients import assert_same, gradients
from PIL import Image
from run_loss import LABELS, fixed_pairs, loss_of, run_two_processes, state_facts
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from gen2embed_mteb import Gen2Embed
from trainers import SahaLoss
from trainers.loss.content_hash import content_digests
from trainers.loss.no_negatives import Facts
from trainers.loss.saha_loss import float32_cosine

TAU = 0.02


@pytest.fixture
def model(tiny_dir):
    return Gen2Embed(tiny_dir("qwen2_vl"), device="cpu")


def features_of(model, *columns, side="left"):
    padding = {"text": {"padding_side": side}}
    return [
        model.preprocess(column, task="document" if number else "query", processing_kwargs=padding)
        for number, column in enumerate(columns)
    ]


def reference(model, queries, candidates, equal, positives=None):
    """InfoNCE from one pass over each column: -log exp(q.p / t) / sum of exp(q.c / t) over c that do not equal p.

    `equal(i, j)` tells whether candidate j, counted column by column, equals the positive of query i.
    """
    q = torch.nn.functional.normalize(model(queries)["sentence_embedding"])
    c = torch.cat([torch.nn.functional.normalize(model(column)["sentence_embedding"]) for column in candidates])
    total = torch.zeros(())
    for i in range(len(q)):
        kept = [j for j in range(len(c)) if j == i or not equal(i, j)]
        scores = torch.stack([q[i] @ c[j] for j in kept]) / TAU
        total = total - (scores[kept.index(i)] - scores.exp().sum().log())
    return total / len(q)


def texts():
    return (
        [f"query {number}, of some words" for number in range(6)],
        ["dog", "cat", "dog", "a much longer positive than the others are", "cat", "cow"],
    )


def pictures_of(*numbers):
    drawn = {number: np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8) for number in numbers}
    return [{"image": Image.fromarray(drawn[number])} for number in numbers]


def images():
    return pictures_of(1, 2, 3, 4, 5, 6), pictures_of(11, 12, 11, 14, 12, 16)


BATCHES = {"text": texts, "image": images, "mixed": fixed_pairs}
EQUAL = {"text": [{0, 2}, {1, 4}], "image": [{0, 2}, {1, 4}], "mixed": [{0, 5}, {2, 6}, {3, 4}]}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_equal_an_uncached_reference(model, kind, masked, side):
    columns = BATCHES[kind]()
    loss = SahaLoss(model, mini_batch_size=4, mask_equal_positives=masked)
    value = loss(features_of(model, *columns, side=side))
    found = gradients(model, value)
    features = features_of(model, *columns)
    expected = reference(model, features[0], features[1:], lambda i, j: masked and {i, j} in EQUAL[kind])
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(found, gradients(model, expected))


def test_further_negatives_that_equal_a_positive_are_masked_too(model):
    queries = texts()[0][:3]
    positives = ["dog", "a cat on a mat", "cow"]
    negatives = ["a cat on a mat", "an owl, and other birds", "dog"]
    features = features_of(model, queries, positives, negatives)
    found = SahaLoss(model)(features)
    words = [*positives, *negatives]
    expected = reference(model, features[0], features[1:], lambda i, j: words[i] == words[j])
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, found), gradients(model, expected))


def test_the_positive_of_an_equal_query_is_no_negative(model):
    """As where a query has several positives, each in a row of its own; its explicit negatives stay negatives."""
    queries = ["find it", "find her", "find it"]
    positives, negatives = ["a dog", "a cat on a mat", "a cow"], ["an owl", "a bee", "an ant, and others"]
    features = features_of(model, queries, positives, negatives)
    found = SahaLoss(model, mini_batch_size=2)(features)
    expected = reference(model, features[0], features[1:], lambda i, j: {i, j} == {0, 2})
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, found), gradients(model, expected))


@pytest.mark.parametrize("by_content", [True, False])
def test_rows_with_fewer_negatives_and_stated_positives_against_a_reference(model, by_content):
    """Columns as sentence-transformers has them, anchor, positive, negative_1, negative_2; three negatives lack."""
    queries = ["first query", "second query", "third"]
    positives, more = ["a dog", "a cat on a mat", "a cow"], [["an owl", "", "a bee"], ["", "", "a cat on a mat"]]
    features = features_of(model, queries, positives, *more)
    words = [*positives, *more[0], *more[1]]
    for column, own in zip(features[1:], [positives, *more], strict=True):
        column["absent"] = torch.tensor([word == "" for word in own])
        column["candidate_number"] = torch.tensor([words.index(word) if word else -1 for word in own])
    # The owl is a negative of the first query, and a further positive of the third.
    features[0]["known_positives"] = torch.tensor([[0, -2], [1, -2], [2, words.index("an owl")]])
    left_out = {(i, j) for i in range(3) for j in range(9) if words[j] == ""}
    left_out |= {(2, words.index("an owl")), (1, 8)}  # the last is the second query's own positive once more
    found = SahaLoss(model, mini_batch_size=2, mask_equal_positives=by_content)(features)
    plain = [
        {name: value for name, value in column.items() if name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        for column in features
    ]
    expected = reference(model, plain[0], plain[1:], lambda i, j: (i, j) in left_out)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_same(gradients(model, found), gradients(model, expected))


def test_without_equal_positives_it_is_the_stock_loss(model):
    queries, positives = texts()
    features = features_of(model, queries[:4], ["dog", *positives[3:]])
    stock = CachedMultipleNegativesRankingLoss(model, scale=1 / TAU, mini_batch_size=2)
    ours = SahaLoss(model, mini_batch_size=2, share_prefix=False)
    assert_same(gradients(model, ours(features)), gradients(model, stock(features, None)), tolerance=1e-7)
    assert ours.similarity_fct is float32_cosine
    with torch.no_grad():
        torch.testing.assert_close(ours(features), stock(features, None), rtol=1e-6, atol=1e-7)
    assert ours.get_config_dict() == {
        **stock.get_config_dict(),
        "similarity_fct": "float32_cosine",
        "mask_equal_positives": True,
    }


@pytest.fixture(scope="module")
def of_two_processes(tiny_dir, tmp_path_factory, preloaded):
    """Under DDP, over gloo; every two equal positives are in different processes."""
    return run_two_processes(tiny_dir("qwen2_vl"), tmp_path_factory.mktemp("two"), preloaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["SahaLoss", "UnimeLoss", "MatryoshkaSahaLoss", "MatryoshkaUnimeLoss", "StatedSahaLoss", "DistillationLoss"]
)
def test_two_processes_equal_one_on_the_joint_batch(model, of_two_processes, kind):
    results = [result[kind] for result in of_two_processes]
    features = features_of(model, *fixed_pairs())
    if kind.startswith("Stated"):
        state_facts(features, slice(None))
    value = loss_of(kind, model)(features, torch.from_numpy(LABELS))
    expected = gradients(model, value)
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, value.detach(), rtol=1e-5, atol=1e-6)
    for result in results:
        assert_same(result["gradients"], expected)


def test_digests_are_equal_for_equal_content_whatever_the_padding(model):
    _, positives = fixed_pairs()
    digests = content_digests(features_of(model, [], positives)[1])
    assert digests.dtype == torch.int64
    for i in range(8):
        for j in range(8):
            assert (digests[i] == digests[j]) == (i == j or {i, j} in EQUAL["mixed"])
    right = content_digests(features_of(model, [], positives, side="right")[1])
    alone = torch.cat([content_digests(features_of(model, [], [positive])[1]) for positive in positives])
    assert torch.equal(digests, right)
    assert torch.equal(digests, alone)


def test_one_pixel_or_the_shape_of_an_image_makes_a_difference(model):
    pixels = np.random.default_rng(0).integers(0, 255, (56, 112, 3), dtype=np.uint8)
    other = pixels.copy()
    other[5, 7, 1] ^= 1
    batch = [Image.fromarray(pixels), Image.fromarray(other), Image.fromarray(pixels.reshape(112, 56, 3))]
    batch += [Image.new("RGB", (56, 112)), Image.new("RGB", (112, 56)), Image.fromarray(pixels)]
    digests = content_digests(features_of(model, [], [{"image": image} for image in batch])[1]).tolist()
    assert digests[0] == digests[5]
    assert len(set(digests)) == 5


def test_digests_do_not_depend_on_the_largest_image_of_the_batch(tiny):
    """LLaVA-NeXT pads the tiles of all images to the most that one has."""
    llava = tiny("llava_next")
    small, large = Image.new("RGB", (56, 56), (200, 0, 0)), Image.new("RGB", (112, 112), (0, 200, 0))
    inputs = [{"image": small, "text": "a"}, {"image": large, "text": "a"}, {"text": "a"}]
    together = content_digests(llava.preprocess(inputs))
    assert together[0] == content_digests(llava.preprocess(inputs[:1]))[0]
    assert len(set(together.tolist())) == 3


def test_rows_that_are_not_padded_tokens_are_refused(model):
    (features,) = features_of(model, ["a", "b"])
    del features["attention_mask"]
    with pytest.raises(ValueError, match="pass mask_equal_positives=False"):
        content_digests(features)


def test_similarities_are_float32_under_autocast_and_of_bfloat16_vectors():
    vectors = torch.nn.functional.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(float32_cosine(vectors, vectors), float32_cosine(vectors, vectors).float())
        torch.testing.assert_close(float32_cosine(vectors, vectors).diagonal(), torch.ones(4), rtol=0, atol=1e-6)
    halves = vectors.bfloat16()
    assert float32_cosine(halves, halves).dtype == torch.float32
    torch.testing.assert_close(float32_cosine(halves, halves).diagonal(), torch.ones(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_without_equal_positives_value_and_gradients_are_the_stock_losses_bit_by_bit(model, num_negatives, size):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    ours = SahaLoss(model, mini_batch_size=size)
    stock = CachedMultipleNegativesRankingLoss(
        model, scale=ours.scale, similarity_fct=float32_cosine, mini_batch_size=size
    )
    random = torch.Generator().manual_seed(0)
    columns = [torch.randn(7, 16, generator=random) for _ in range(2 + num_negatives)]
    different = torch.arange(4 * 7 * (1 + num_negatives)).reshape(7, 1 + num_negatives, 4)
    different[..., 1] = different[:, :1, 1]  # the query of the row
    different[..., 3] = 0  # nothing is a placeholder
    facts = Facts(different)
    found = {}
    for loss, labels in ((ours, facts), (ours, None), (stock, None)):
        reps = [[part.clone().requires_grad_() for part in column.split(size)] for column in columns]
        value = loss.calculate_loss(reps, labels, with_backward=True)
        found[loss, labels is None] = [value, *(part.grad for column in reps for part in column)]
    for other in (found[ours, False], found[ours, True]):
        assert all(torch.equal(a, b) for a, b in zip(other, found[stock, True], strict=True))
