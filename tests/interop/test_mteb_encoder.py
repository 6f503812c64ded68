"""The encoder on mteb's own mock tasks: all of them run, and what reaches the model is what is meant."""

import copy
import json
from typing import Any

import datasets
import mteb
import numpy as np
import pytest
from mteb._create_dataloaders import create_dataloader
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID, MOCK_MIEB_TASK_GRID, MOCK_TASK_TEST_GRID
from mteb.mocks.mock_run import get_compatible_mock_tasks, mock_run
from mteb.models import CachedEmbeddingWrapper
from mteb.types import PromptType
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.mteb_plugin.models.encoder import Gen2EmbedEncoder

SYSTEM = "Given an image, summarize the provided image in one word. Given only text, describe the text in one word."
MOCKS = {task.metadata.name: task for task in (*MOCK_TASK_TEST_GRID, *MOCK_MIEB_TASK_GRID)}


@pytest.fixture(scope="module")
def encoder() -> Any:
    return mteb.get_model("gen2embed-mini", device="cpu")


@pytest.fixture(scope="module")
def mock_results(encoder: Any) -> Any:
    datasets.disable_progress_bars()
    return mock_run(encoder)


def test_there_are_the_43_mock_tasks_that_are_known(encoder: Any) -> None:
    assert len(MOCKS) == 43
    assert {task.metadata.name for task in get_compatible_mock_tasks(encoder)} == set(MOCKS)
    grid = {
        task.metadata.name for task in ALL_MOCK_TASK_TEST_GRID if set(task.metadata.modalities) <= {"text", "image"}
    }
    assert grid == set(MOCKS)  # what mteb ships beyond these is audio and video


@pytest.mark.parametrize("name", MOCKS)
@pytest.mark.slow
def test_mock_task_runs(name: str, mock_results: Any) -> None:
    outcome = mock_results[name]  # None: skipped as not compatible; a `TaskError`: failed, for lack of a package also
    assert isinstance(outcome, mteb.TaskResult), outcome
    scores = [part["main_score"] for parts in outcome.scores.values() for part in parts]
    assert scores and all(isinstance(score, float) for score in scores)


Q_TEXT = "\nRepresent the given text in one word."
Q_IMAGE = "\nRepresent the given text/image in one word."
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SENTENCES = ["This is a test sentence", "This is another test sentence"]
DANISH = ["dette er en test sætning", "denne her matche ikke den ovenstående"]
TRAINED_ON = [*SENTENCES, "This is another train sentence"]
SUMMARIES = [f"This is {part}summary" for part in ("a ", "another ", "a machine ", "another machine ")]
POSITIVES = ["This is a positive sentence", "This is another positive sentence"]


def queries(instruction: str, texts: list[str] = SENTENCES) -> set[tuple[str, str]]:
    return {("query", f"{instruction}{text}{Q_TEXT}") for text in texts}


TITLED = {
    ("document", "Title of d1 This is a positive sentence"),
    ("document", "Title of d2 This is another positive sentence"),
}
DEFAULT = "Retrieve text based on user query.\n"
INSTRUCTED = {
    ("query", f"{DEFAULT}This is a test instruction\nThis is a test sentence{Q_TEXT}"),
    ("query", f"{DEFAULT}This is another test instruction\nThis is another test sentence{Q_TEXT}"),
}
IMAGE_QUERY = {("query", f"{IMAGE}{Q_IMAGE}")}

# One task of each type: exactly what is in the user turn, by side. Types of images have no instruction, for mteb's
# speak of passages.
EXPECTED = {
    "MockBitextMiningTask": queries("Retrieve parallel sentences.\n", SENTENCES + DANISH),
    "MockClassificationTask": queries("Classify user passages.\n", TRAINED_ON),
    "MockRegressionTask": queries("Predict the value of the user passage.\n", TRAINED_ON),
    "MockClusteringTask": queries(
        "Identify categories in user passages.\n", [*SENTENCES, "This is a third test sentence"]
    ),
    "MockPairClassificationTask": queries(
        "Retrieve text that are semantically similar to the given text.\n", SENTENCES + DANISH
    ),
    "MockRerankingTask": queries(DEFAULT) | TITLED,
    "MockRetrievalTask": queries(DEFAULT) | TITLED,
    "MockSTSTask": queries("Retrieve semantically similar text.\n", SENTENCES + DANISH),
    "MockMultilabelClassification": queries("Classify user passages.\n", TRAINED_ON),
    "MockSummarizationTask": queries(
        "Given a news summary, retrieve other semantically similar summaries.\n", SUMMARIES
    ),
    "MockInstructionRetrieval": INSTRUCTED | TITLED,
    "MockInstructionReranking": INSTRUCTED | TITLED,
    "MockTextZeroShotClassification": queries("Classify the given input into one of the candidate labels.\n")
    | {("document", text) for text in SENTENCES},
    "MockAny2AnyRetrievalI2T": IMAGE_QUERY | {("document", text) for text in POSITIVES},
    "MockAny2AnyRetrievalT2I": queries("", POSITIVES) | {("document", IMAGE)},
    "MockVisionCentricQA": {("query", f"{IMAGE}{text}{Q_IMAGE}") for text in POSITIVES} | {("document", IMAGE)},
    "MockImageClassification": IMAGE_QUERY,
    "MockImageClustering": IMAGE_QUERY,
    "MockImageMultilabelClassification": IMAGE_QUERY,
    "MockImageRegressionTask": IMAGE_QUERY,
    "MockPairImageClassificationTask": IMAGE_QUERY,
    "MockVisualSTS": IMAGE_QUERY,
    "MockZeroShotClassification": IMAGE_QUERY | {("document", text) for text in SENTENCES},
    "MockImageTextPairClassification": {("document", IMAGE)}
    | queries("Find me an image that matches the given caption: "),
}


def test_every_type_of_mock_task_has_an_expectation() -> None:
    assert {MOCKS[name].metadata.type for name in EXPECTED} == {task.metadata.type for task in MOCKS.values()}


@pytest.fixture
def reaching(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Every (side, user turn) that is rendered for the model; system turn and opened assistant turn are asserted."""
    seen = set()
    prepare = PrefixEncoder.prepare

    def recording(self: PrefixEncoder, side: Any, inputs: list[dict[str, Any]]) -> Any:
        for sample in inputs:
            rendered = self._model.render(sample, side)
            before, after = (
                f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n",
            )
            assert rendered.startswith(before) and rendered.endswith(after)
            seen.add((side, rendered[len(before) : -len(after)]))
        return prepare(self, side, inputs)

    monkeypatch.setattr(PrefixEncoder, "prepare", recording)
    return seen


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_what_reaches_the_model(name: str, encoder: Any, reaching: set[tuple[str, str]]) -> None:
    mteb.evaluate(encoder, MOCKS[name], cache=None, show_progress_bar=False)
    assert reaching == EXPECTED[name]


def loader(columns: dict[str, list[Any]], task: Any, prompt_type: PromptType | None, batch_size: int = 2) -> Any:
    table = datasets.Dataset.from_dict({"id": [str(n) for n in range(len(next(iter(columns.values()))))], **columns})
    return create_dataloader(table, task_metadata=task.metadata, prompt_type=prompt_type, batch_size=batch_size)


def encode(encoder: Any, data: Any, task: Any, prompt_type: PromptType | None) -> np.ndarray:
    names = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    return encoder.encode(data, **names, prompt_type=prompt_type)


def test_vectors_are_those_of_the_model_whatever_the_batches(
    encoder: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaved text and images, of sizes that differ, batched by mteb one by one and by three."""
    sizes = []
    prepare = PrefixEncoder.prepare
    monkeypatch.setattr(
        PrefixEncoder, "prepare", lambda self, side, inputs: sizes.append(len(inputs)) or prepare(self, side, inputs)
    )
    task = MOCKS["MockVisionCentricQA"]
    columns = {"image": pictures, "text": ["one", "two two", "three " * 9, ""]}
    expected = encoder.model.encode_query(
        [{"text": text, "image": image} for text, image in zip(columns["text"], columns["image"], strict=True)][:3]
    )
    for batch_size in (1, 3):
        vectors = encode(encoder, loader(columns, task, PromptType.query, batch_size), task, PromptType.query)
        assert vectors.dtype == np.float32
        assert vectors.shape == (4, encoder.model.get_embedding_dimension())
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(vectors[:3], expected, atol=2e-5)
    assert sizes == [4, 4]  # batched anew, by length


@pytest.mark.parametrize("name", ["MockAny2AnyRetrievalI2T", "MockZeroShotClassification", "MockRetrievalTask"])
def test_a_model_handed_over_as_an_object_scores_as_it_does_through_the_registry(
    name: str, encoder: Any, reaching: set[tuple[str, str]], recwarn: Any
) -> None:
    model = Gen2Embed("gen2embed-mini", device="cpu")
    scores = []
    for one in (model, encoder):
        task = copy.deepcopy(MOCKS[name])  # a task draws other pictures each time it is loaded
        result = mteb.evaluate(one, task, cache=None, show_progress_bar=False)
        assert result.model_name == "Gen2Embed/gen2embed-mini"
        assert reaching == EXPECTED[name]  # images included
        reaching.clear()
        scores.append(json.dumps(result[0].scores))
    assert scores[0] == scores[1]
    assert not [warning for warning in recwarn if "modalit" in str(warning.message).lower()]


def test_results_of_objects_are_kept_apart_by_what_decides_their_vectors() -> None:
    wrapper = mteb.SentenceTransformerEncoderWrapper
    one = wrapper(Gen2Embed("gen2embed-mini", device="cpu"))
    assert isinstance(one, Gen2EmbedEncoder)
    same = wrapper(Gen2Embed("gen2embed-mini", device="cpu"))
    other = wrapper(Gen2Embed("gen2embed-mini", device="cpu", truncate_dim=64))
    assert one.mteb_model_meta.revision == same.mteb_model_meta.revision != other.mteb_model_meta.revision
    assert (one.mteb_model_meta.embed_dim, other.mteb_model_meta.embed_dim) == (192, 64)
    assert set(one.mteb_model_meta.modalities) == {"text", "image"}


def test_cut_vectors_have_length_1_as_their_inner_products_are_cosines(encoder: Any) -> None:
    # What mteb asks of a model whose vectors may be cut:
    meta = mteb.get_model_meta("gen2embed-mini").model_copy(update={"embed_dim": [192, 64]})
    loaded = meta.load_model(device="cpu", embed_dim=64)
    task = MOCKS["MockRetrievalTask"]
    where: dict[str, Any] = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    vectors = [one.encode([{"text": SENTENCES}], prompt_type=PromptType.document, **where) for one in (loaded, encoder)]
    assert vectors[0].shape == (2, 64)
    expected = vectors[1][:, :64] / np.linalg.norm(vectors[1][:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[0], expected, atol=1e-6)
    assert loaded.mteb_model_meta.embed_dim == 64


def test_other_models_are_wrapped_by_mteb_as_before(tmp_path: Any) -> None:
    stock = SentenceTransformer(modules=[BoW(["a", "red", "fox"])])
    wrapped = mteb.SentenceTransformerEncoderWrapper(stock)
    assert type(wrapped) is mteb.SentenceTransformerEncoderWrapper
    assert wrapped.model is stock


class Batches:
    """A data loader that hands over images as they are."""

    dataset = datasets.Dataset.from_dict({"image": ["stands for them"]})

    def __init__(self, images: list[Any]) -> None:
        self._images = images

    def __iter__(self) -> Any:
        yield {"image": self._images}


def test_a_row_may_have_several_images(encoder: Any, pictures: list[Image.Image]) -> None:
    vectors = encode(encoder, Batches([pictures[:2], pictures[2:3], None]), MOCKS["MockVisualSTS"], None)
    expected = encoder.model.encode_query([{"image": pictures[:2]}, {"image": pictures[2]}, ""])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)


def test_images_of_every_mode_are_taken_as_rgb(encoder: Any) -> None:
    task = MOCKS["MockVisualSTS"]
    random = np.random.default_rng(3)
    grey = Image.fromarray(random.integers(0, 255, (40, 50), dtype=np.uint8))
    colour = Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    others = [grey, colour.convert("RGBA"), colour.convert("P")]
    vectors = encode(encoder, Batches(others), task, None)
    expected = encode(encoder, Batches([image.convert("RGB") for image in others]), task, None)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_images_are_let_go_in_between_and_the_vectors_stay(
    encoder: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gen2embed_mteb.mteb_plugin.models import encoder as module

    task = MOCKS["MockVisionCentricQA"]
    columns = {"image": [*pictures, *pictures], "text": ["a"] * 8}
    expected = encode(encoder, loader(columns, task, PromptType.query), task, PromptType.query)
    monkeypatch.setattr(module, "MAX_HELD_PIXELS", 5_000)
    vectors = encode(encoder, loader(columns, task, PromptType.query), task, PromptType.query)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_array_equal(vectors[:4], vectors[4:])


def test_documents_are_given_no_instruction_even_if_mteb_has_one(encoder: Any, reaching: set[tuple[str, str]]) -> None:
    task = MOCKS["MockRetrievalTask"]
    stated = task.metadata.model_copy(update={"prompt": {"query": "Ask:", "document": "Tell:"}})
    for side in PromptType:
        data = loader({"text": ["words"]}, task, side)
        encoder.encode(data, task_metadata=stated, hf_split="test", hf_subset="default", prompt_type=side)
    assert reaching == {("query", f"Ask: words{Q_TEXT}"), ("document", "words")}


def test_mtebs_cache_of_embeddings_does_not_say_the_instruction_twice(
    encoder: Any, reaching: set[tuple[str, str]], tmp_path: Any
) -> None:
    cached = CachedEmbeddingWrapper(encoder, tmp_path)
    mteb.evaluate(cached, MOCKS["MockInstructionRetrieval"], cache=None, show_progress_bar=False)
    asked = {turn for turn in reaching if turn[0] == "query"}
    assert asked == INSTRUCTED  # mteb's cache hands over the glued text as the query


def test_similarities_of_equal_candidates_are_equal_wherever_they_stand(encoder: Any) -> None:
    random = np.random.default_rng(5)
    rows = random.normal(size=(1001, 192)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    repeated = np.vstack([rows[:1], rows, rows[:1], rows[7:500], rows[:1]])
    scores = encoder.similarity(rows[3], repeated)[0].numpy()
    assert len(set(scores[[0, 1, 1002, -1]].tolist())) == 1
    np.testing.assert_allclose(scores, repeated.astype(np.float64) @ rows[3], atol=1e-6)
    pairs = encoder.similarity_pairwise(rows[:5], rows[5:10])
    np.testing.assert_allclose(pairs, np.diag(encoder.similarity(rows[:5], rows[5:10])), atol=1e-6)


def test_an_input_that_cannot_be_encoded_is_named() -> None:
    encoder = mteb.get_model("gen2embed-mini", device="cpu", max_length=56)
    task = MOCKS["MockVisualSTS"]
    with pytest.raises(ValueError, match=r"MockVisualSTS, subset default, split test, query 0 cannot be encoded"):
        encode(encoder, Batches([Image.new("RGB", (64, 64))]), task, None)


def test_a_task_with_slots_has_prompts_of_its_own() -> None:
    encoder = mteb.get_model("gen2embed-mini", device="cpu", prompt_mode="freeret")
    model = encoder.model
    columns = {"text": ["a red circle", "a blue square"]}
    vectors = {}
    for name in ("MMEB-mini-Scenes_t2i", "MMEB-mini-WebPages", "MockRetrievalTask"):
        task = MOCKS["MockRetrievalTask"] if name.startswith("Mock") else mteb.get_task(name)
        for prompt_type in (PromptType.query, PromptType.document):
            vectors[name, prompt_type.value] = encode(encoder, loader(columns, task, prompt_type), task, prompt_type)
    for dataset in ("Scenes_t2i", "WebPages"):
        for side in ("query", "document"):
            expected = getattr(model, f"encode_{side}")(columns["text"], prompt_name=f"{dataset}:{side}")
            np.testing.assert_allclose(vectors[f"MMEB-mini-{dataset}", side], expected, atol=1e-5)
    np.testing.assert_allclose(
        vectors["MockRetrievalTask", "document"], model.encode_document(columns["text"]), atol=1e-5
    )
    scenes, pages = vectors["MMEB-mini-Scenes_t2i", "query"], vectors["MMEB-mini-WebPages", "query"]
    assert np.abs(scenes - pages).max() > 1e-3
