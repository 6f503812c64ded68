"""Bulk encoding: once each, in sorted batches, faults kept apart from their neighbours, the contract enforced."""

import hashlib
import json
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmeb_files import COLOURS, write_images
from PIL import Image
from plain_encoder import DIMENSIONS, PlainEncoder, vector

from gen2embed_mteb.bulk.encoder import BATCHES_PER_SHARD, BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Fault, Item
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.kept_bytes import KeptBytes
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.images.source import ImageSource


class Recorder(PlainEncoder):
    """Keeps the batches as they came."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[dict[str, Any]]] = []

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        self.batches.append(inputs)
        return super()._encode(side, inputs)


def bulk(folder: Path, encoder: Any, **kwargs: Any) -> BulkEncoder:
    write_images(folder / "img")
    return BulkEncoder(encoder, EmbeddingStore(folder / "e", {"f": "1"}), ImageSource(folder), **kwargs)


def test_every_distinct_item_once_per_side(tmp_path: Path) -> None:
    encoder = Recorder()
    bulk_encoder = bulk(tmp_path, encoder)
    items = [Item("a"), Item("b", ("img/red.png",)), Item("a"), Item("b", ("img/blue.png",)), Item("b")]
    bulk_encoder.add("query", items)
    bulk_encoder.add("query", [Item("b"), Item("c")])
    bulk_encoder.add("document", [Item("a")])
    assert encoder.given == {
        ("query", "a", ()): 1,
        ("query", "b", ()): 1,
        ("query", "c", ()): 1,
        ("query", "b", ((32, 32),)): 2,  # the red one and the blue one
        ("document", "a", ()): 1,
    }
    assert bulk_encoder.num_encoded == 6  # a, b, b+red, b+blue, c; and a on the other side
    assert bulk_encoder.num_reused == 0


def test_vectors_are_the_encoders_in_the_order_asked(tmp_path: Path) -> None:
    bulk_encoder = bulk(tmp_path, PlainEncoder(), batch_size=3)
    items = [Item("long text here", ()), Item("x"), Item("", ("img/red.png",)), Item("red", ("img/red.png",)), Item("")]
    bulk_encoder.add("query", items)
    red = Image.new("RGB", (32, 32), COLOURS["red"])
    expected = np.stack([vector(item.text, [red] * len(item.images)) for item in items])
    assert bulk_encoder.vectors("query", items).shape == (5, DIMENSIONS)
    assert np.allclose(bulk_encoder.vectors("query", items), expected, atol=1e-4)
    assert np.array_equal(bulk_encoder.vectors("query", items[::-1]), bulk_encoder.vectors("query", items)[::-1])
    assert bulk_encoder.vectors("query", []).shape == (0, 0)
    with pytest.raises(KeyError):
        bulk_encoder.vectors("document", items[:1])


def test_batches_are_sorted_longest_first_and_keys_are_left_out_when_empty(tmp_path: Path) -> None:
    encoder = Recorder()
    items = [
        Item("four4"),
        Item("", ("img/red.png",)),
        Item("three", ("img/red.png", "img/blue.png")),
        Item("1"),
        Item(""),
    ]
    bulk(tmp_path, encoder, batch_size=2).add("query", items)
    keys = [[sorted(entry) for entry in batch] for batch in encoder.batches]
    assert keys == [[["image", "text"]], [["image"]], [["text"], ["text"]], [["text"]]]
    assert [entry.get("text") for batch in encoder.batches for entry in batch] == ["three", None, "four4", "", "1"]
    assert [image.getpixel((0, 0)) for image in encoder.batches[0][0]["image"]] == [(255, 0, 0), (0, 0, 255)]


class Counting(Recorder):
    """A staged encoder: a token a character and ten an image, and where it was called from."""

    batch_tokens = 8192

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[str] = set()

    def count_tokens(self, side: str, texts: Any, image_sizes: Any) -> list[int]:
        return [len(text) + 10 * len(sizes) for text, sizes in zip(texts, image_sizes, strict=True)]

    def prepare(self, side: str, inputs: list[dict[str, Any]]) -> Any:
        self.threads.add(threading.current_thread().name)
        return list(inputs)

    def encode_prepared(self, side: str, batch: Any) -> np.ndarray:
        assert threading.current_thread() is threading.main_thread()
        return self._encode(side, batch)


def test_batches_hold_as_many_inputs_as_their_tokens_allow_with_padding(tmp_path: Path) -> None:
    encoder = Counting()
    lengths = [25, 12, 11, 9, 6, 6, 5, 5, 3, 1]
    bulk(tmp_path, encoder, batch_tokens=24, batch_size=4).add("query", [Item("x" * length) for length in set(lengths)])
    sizes = [[len(entry["text"]) for entry in batch] for batch in encoder.batches]
    assert sizes == [[25], [12, 11], [9, 6], [5, 3, 1]]  # one too long runs alone; 24 // 5 = 4 but three are left
    encoder = Counting()
    lengths = [1000, 990, 900, 700, 650, 600, 90, 80, 70]
    bulk(tmp_path / "3", encoder, batch_tokens=10_000).add("query", [Item("x" * length) for length in lengths])
    sizes = [[len(entry["text"]) for entry in batch] for batch in encoder.batches]
    assert sizes == [[1000, 990, 900], [700, 650, 600], [90, 80, 70]]  # with 700 410 of 4,000 would be padding
    encoder = Counting()
    bulk(tmp_path / "2", encoder, batch_tokens=24).add("query", [Item("a", ("img/red.png",)), *map(Item, "bcdef")])
    assert [len(batch) for batch in encoder.batches] == [2, 4]  # 11 tokens with the image: two rows of 11
    assert encoder.threads == {"prepare_0"}


def test_images_are_compared_by_content(tmp_path: Path) -> None:
    encoder = Recorder()
    bulk_encoder = bulk(tmp_path, encoder)
    for name in ("img/copy.png", "img/other.png"):
        (tmp_path / name).write_bytes((tmp_path / "img" / "red.png").read_bytes())
    Image.new("RGB", (32, 32), COLOURS["blue"]).save(tmp_path / "img" / "other.png")
    items = [Item("a", ("img/red.png",)), Item("a", ("img/copy.png",)), Item("a", ("img/other.png",))]
    bulk_encoder.add("query", items)
    bulk_encoder.add("query", [Item("a", ("img/copy.png",))])
    assert sum(encoder.given.values()) == 2
    red, copy, other = bulk_encoder.vectors("query", items)
    assert np.array_equal(red, copy)
    assert not np.allclose(red, other)


def test_faults_stay_with_their_item(tmp_path: Path) -> None:
    encoder = PlainEncoder()
    bulk_encoder = bulk(tmp_path, encoder, batch_size=2)
    (tmp_path / "img" / "cut.png").write_bytes((tmp_path / "img" / "red.png").read_bytes()[:60])
    good, missing, cut = Item("a", ("img/red.png",)), Item("b", ("img/none.png",)), Item("c", ("img/cut.png",))
    bulk_encoder.add("query", [good, missing, cut])
    assert bulk_encoder.fault("query", good) is None
    assert bulk_encoder.vectors("query", [good]).shape == (1, DIMENSIONS)
    fault = bulk_encoder.fault("query", missing)
    assert fault is not None
    assert (fault.file, fault.reason.startswith("not found in")) == ("img/none.png", True)
    fault = bulk_encoder.fault("query", cut)
    assert fault is not None
    assert fault.reason.startswith("damaged")
    with pytest.raises(ValueError, match="has no vector"):
        bulk_encoder.vectors("query", [good, cut])
    # The faults come back from disk with the rest, and a repaired image is encoded.
    again = bulk(tmp_path, encoder, batch_size=2)
    again.add("query", [good, missing, cut])
    assert again.fault("query", cut) == fault
    assert again.num_encoded == 0
    (tmp_path / "img" / "none.png").write_bytes((tmp_path / "img" / "blue.png").read_bytes())
    repaired = bulk(tmp_path, encoder, batch_size=2)
    repaired.add("query", [good, missing, cut])
    assert repaired.fault("query", missing) is None
    assert repaired.fault("query", cut) == fault


def test_reuse_is_by_work_not_by_position(tmp_path: Path) -> None:
    items = [Item(f"text {number:04}") for number in range(BATCHES_PER_SHARD * 2 + 3)]
    first = bulk(tmp_path, PlainEncoder(), batch_size=1)
    first.add("query", items)
    again = bulk(tmp_path, PlainEncoder(), batch_size=1)
    again.add("query", items)
    assert (again.num_encoded, again.num_reused) == (0, len(items))
    assert np.array_equal(again.vectors("query", items), first.vectors("query", items))
    # Another batch size is other work: a padded model would give other bits.
    other = bulk(tmp_path, PlainEncoder(), batch_size=2)
    other.add("query", items)
    assert other.num_reused == 0
    # Only what the first shard holds is found when the list is cut short.
    short = bulk(tmp_path, PlainEncoder(), batch_size=1)
    short.add("query", items[: BATCHES_PER_SHARD + 1])
    assert (short.num_encoded, short.num_reused) == (1, BATCHES_PER_SHARD)


def test_sides_do_not_share_vectors(tmp_path: Path) -> None:
    class TwoSided(PlainEncoder):
        def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
            return np.tile(np.eye(2)[int(side == "query")], (len(inputs), 1))

    for _ in range(2):  # the second time from disk
        bulk_encoder = bulk(tmp_path, TwoSided())
        bulk_encoder.add("query", [Item("a")])
        bulk_encoder.add("document", [Item("a")])
        assert bulk_encoder.vectors("query", [Item("a")]).tolist() == [[0, 1]]
        assert bulk_encoder.vectors("document", [Item("a")]).tolist() == [[1, 0]]


class Scripted:
    """An encoder that answers as told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.sizes: list[int] = []

    def encode_query(self, inputs: list[dict[str, Any]], /) -> Any:
        self.sizes.append(len(inputs))
        return self.answer(inputs)

    encode_document = encode_query


def test_an_input_that_the_encoder_refuses_is_a_fault(tmp_path: Path) -> None:
    def answer(inputs: list[dict[str, Any]]) -> Any:
        if any(entry["text"] == "bb" for entry in inputs):
            raise ValueError("image does not fit max_length")
        return np.eye(4)[: len(inputs)]

    bulk_encoder = bulk(tmp_path, Scripted(answer))
    bulk_encoder.add("query", [Item("a"), Item("bb"), Item("ccc")])
    assert bulk_encoder.fault("query", Item("bb")) == Fault("", "refused by the encoder: image does not fit max_length")
    assert np.array_equal(bulk_encoder.vectors("query", [Item("a"), Item("ccc")]), np.eye(4)[[0, 0]])


def test_an_encoder_that_refuses_everything_ends_the_run(tmp_path: Path) -> None:
    def answer(inputs: list[dict[str, Any]]) -> Any:
        raise ValueError("not loaded")

    with pytest.raises(ValueError, match="not loaded"):
        bulk(tmp_path, Scripted(answer)).add("query", [Item("a"), Item("b")])


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_out_of_memory_halves_the_batch_and_is_remembered(tmp_path: Path) -> None:
    def answer(inputs: list[dict[str, Any]]) -> Any:
        if len(inputs) > 2:
            raise OutOfMemoryError("CUDA out of memory")
        return np.eye(16)[[len(entry["text"]) for entry in inputs]]

    encoder = Scripted(answer)
    bulk_encoder = bulk(tmp_path, encoder, batch_size=5)
    items = [Item("x" * length) for length in range(15)]
    bulk_encoder.add("query", items)
    # An input counts 1 + length // 4 tokens. 14 to 10 (18 tokens) fail: the limit is 9, two rows (7) run, three (11)
    # are split untried. 9 to 5 (12) are split untried, then three rows (8) fail: the limit is 4, and two rows (6) are
    # split. And so on.
    assert encoder.sizes == [5, 2, 1, 2, 2, 3, 1, 1, 1, 2, 3, 1, 1, 1]
    assert bulk_encoder.num_halvings == 2 + 3 + 3
    assert np.array_equal(bulk_encoder.vectors("query", items), np.eye(16)[:15])
    marker = json.loads(next(path for path in (tmp_path / "e").glob("*.json") if path.stem != "manifest").read_text())
    assert marker["num_halvings"] == 8
    with pytest.raises(RuntimeError, match="something else"):
        bulk(tmp_path, Scripted(lambda inputs: (_ for _ in ()).throw(RuntimeError("something else")))).add(
            "query", [Item("new")]
        )


def test_an_input_too_large_even_alone_ends_the_run(tmp_path: Path) -> None:
    def answer(inputs: list[dict[str, Any]]) -> Any:
        raise OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError):
        bulk(tmp_path, Scripted(answer)).add("query", [Item("a"), Item("b")])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda inputs: np.ones(4), r"shape \(4,\) for 2 inputs"),
        (lambda inputs: np.eye(4)[:1], r"shape \(1, 4\) for 2 inputs"),
        (lambda inputs: 2 * np.eye(4)[:2], r"norm 2\.0000; normalise"),
        (lambda inputs: np.zeros((2, 4)), r"norm 0\.0000"),
    ],
)
def test_the_encoder_keeps_its_contract(tmp_path: Path, answer: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bulk(tmp_path, Scripted(answer)).add("query", [Item("a"), Item("b")])


def test_nan_is_a_fault_of_its_row(tmp_path: Path) -> None:
    rows = np.eye(4)[:2]
    rows[1] = np.nan
    bulk_encoder = bulk(tmp_path, Scripted(lambda inputs: rows))
    bulk_encoder.add("query", [Item("a"), Item("b")])
    assert bulk_encoder.fault("query", Item("a")) is None
    assert bulk_encoder.fault("query", Item("b")) == Fault("", "the encoder returned NaN or infinity")


def test_resize_and_least_side_apply(tmp_path: Path) -> None:
    encoder = Recorder()
    write_images(tmp_path / "img", (10, 20))
    source = ImageSource(tmp_path)
    BulkEncoder(encoder, EmbeddingStore(tmp_path / "1", {}), source).add("query", [Item("", ("img/red.png",))])
    BulkEncoder(encoder, EmbeddingStore(tmp_path / "2", {}), source, image_options=ImageOptions(min_side=0)).add(
        "query", [Item("", ("img/red.png",))]
    )
    BulkEncoder(encoder, EmbeddingStore(tmp_path / "3", {}), source, image_options=ImageOptions(resize="official")).add(
        "query", [Item("", ("img/red.png",))]
    )
    assert [batch[0]["image"].size for batch in encoder.batches] == [(28, 56), (10, 20), (336, 672)]


@pytest.mark.parametrize("at", ["facts", "open"])
def test_an_error_of_the_system_ends_the_run_and_sets_no_image_aside(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of file descriptors, every picture would be called damaged, and the rest be scored."""
    bulk_encoder, item = bulk(tmp_path, PlainEncoder()), Item("a", ("img/red.png",))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    stock = getattr(ImageSource, at)

    def starved(self: ImageSource, path: str) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            return stock(self, path)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    monkeypatch.setattr(ImageSource, at, starved)
    monkeypatch.setattr(KeptBytes, "get", lambda *_: None)  # the file is to be read again
    with pytest.raises((OSError, ImageError), match="Too many open files"):
        bulk_encoder.add("query", [item])
    monkeypatch.undo()
    assert not list((tmp_path / "e").glob("*.npy"))
    bulk_encoder = bulk(tmp_path, PlainEncoder())
    bulk_encoder.add("query", [item])
    assert bulk_encoder.fault("query", item) is None


class OfDataset(Recorder):
    """An encoder with prompts: the vectors are those of the text with the prompt behind it."""

    def __init__(self, prompts: dict[str, str]) -> None:
        super().__init__()
        self.prompts = prompts

    def _encode(self, side: str, inputs: list[dict[str, Any]]) -> np.ndarray:
        super()._encode(side, inputs)
        said = self.prompts.get(side, "")
        images = [[entry["image"]] if "image" in entry else [] for entry in inputs]
        return np.stack([vector(f"{e.get('text', '')} {said}", i) for e, i in zip(inputs, images, strict=True)])


class PerDataset(OfDataset):
    def __init__(self, prompts: dict[str, dict[str, str]]) -> None:
        super().__init__({})
        self.of_datasets = {name: OfDataset(said) for name, said in prompts.items()}

    def for_dataset(self, dataset: str, /) -> OfDataset | None:
        return self.of_datasets.get(dataset)


def test_inputs_are_compared_within_the_datasets_of_the_same_prompts_only(tmp_path: Path) -> None:
    birds, same = {"query": "which bird", "document": "a bird"}, {"document": "a bird", "query": "which bird"}
    encoder = PerDataset({"birds": birds, "more": same, "half": {"query": "which bird"}})
    bulk_encoder = bulk(tmp_path, encoder)
    items = [Item("red"), Item("x", ("img/red.png",))]
    red = Image.new("RGB", (32, 32), COLOURS["red"])
    for dataset, said in (("birds", birds), ("more", same), ("half", {"query": "which bird"}), ("none", {})):
        one = bulk_encoder.for_dataset(dataset)
        for side in ("query", "document"):
            one.add(side, items)
            expected = np.stack([vector(f"red {said.get(side, '')}", []), vector(f"x {said.get(side, '')}", [red])])
            assert np.allclose(one.vectors(side, items), expected, atol=1e-6), (dataset, side)
    assert bulk_encoder.for_dataset("more") is bulk_encoder.for_dataset("birds")
    assert bulk_encoder.for_dataset("none") is bulk_encoder
    # Birds: four. Half: its candidates; its queries have the prompt of birds, and are found in the store. None: its
    # queries; its candidates have the usual prompt, as those of half.
    assert (bulk_encoder.num_encoded, bulk_encoder.num_reused) == (8, 4)
    assert encoder.of_datasets["more"].given == {}
    again = bulk(tmp_path, PerDataset({"birds": birds}))
    again.for_dataset("birds").add("query", items)
    again.add("query", items)
    assert (again.num_encoded, again.num_reused) == (0, 4)
    assert not np.allclose(again.for_dataset("birds").vectors("query", items), again.vectors("query", items), atol=0.1)


def test_the_prompts_of_an_encoder_without_datasets_leave_keys_as_they_were(tmp_path: Path) -> None:
    """Stores of earlier versions stay valid."""
    bulk(tmp_path, PlainEncoder()).add("query", [Item("a")])
    known = hashlib.sha256(json.dumps(["query", [[["a", []]]]]).encode()).hexdigest()
    assert [path.stem for path in (tmp_path / "e").glob("*.npy")] == [known[:32]]
