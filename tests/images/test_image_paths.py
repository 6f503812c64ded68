"""Every path that opens images: the same vector for the same picture, limits that hold everywhere, links, bad input."""

import io
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pandas as pd
import pytest
import torch
from mteb.types import PromptType
from PIL import Image, ImageOps

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.encoder import BulkEncoder, cut_batches
from gen2embed_mteb.bulk.pipeline import MAX_PIXELS_IN_FLIGHT
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.decoding import open_image
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ImageOptions, fitted_size
from gen2embed_mteb.images.source import ImageSource
from trainers.batches.collation import CellReader
from vlm2vec_adapter.scripts.engine import Engine, Sample

HELPERS = Path(__file__).parents[1] / "helpers"
RANDOM = np.random.default_rng(5)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = Image.fromarray(RANDOM.integers(0, 255, (height, width, 4), dtype=np.uint8), "RGBA")
    return pixels if mode == "RGBA" else pixels.convert("RGB").convert(mode)


def stated_range(image: Image.Image, least: float, greatest: float) -> bytes:
    """A TIFF that states its black and white."""
    buffer = io.BytesIO()
    image.save(buffer, "tiff", tiffinfo={340: least, 341: greatest})
    return buffer.getvalue()


def pictures() -> Iterator[tuple[str, bytes]]:
    """Odd pictures, as files."""
    plain = {
        "1x1": noise(1, 1),
        "20x300": noise(20, 300),
        "5000x40": noise(5000, 40),
        "100x10": noise(100, 10),
        "402x2": noise(402, 2),
        "64x64": noise(64, 64),
        "grey": noise(50, 60, "L"),
        "rgba": noise(60, 50, "RGBA"),
        "16 bit": Image.fromarray(RANDOM.integers(0, 65535, (40, 50), dtype=np.uint16)),
        "palette": noise(40, 40).quantize(16),
        "1 bit": noise(40, 40, "1"),
    }
    for name, image in plain.items():
        options = {"transparency": bytes(range(16))} if name == "palette" else {}
        buffer = io.BytesIO()
        image.save(buffer, "png", **options)
        yield f"{name}.png", buffer.getvalue()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turned by a quarter
    for name, image, options in (
        (
            "rotated",
            noise(70, 40),
            {"exif": rotated},
        ),
        ("cmyk", noise(40, 70, "CMYK"), {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", **options)
        yield f"{name}.jpg", buffer.getvalue()
    integers = Image.fromarray(RANDOM.integers(0, 4095, (40, 40), dtype=np.int32))
    yield "I.tif", stated_range(integers, 0, 4095)
    floats = Image.fromarray(RANDOM.random((40, 40), dtype=np.float32))
    yield "F.tif", stated_range(floats, 0.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    for name, data in pictures():
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def model() -> Gen2Embed:
    torch.set_num_threads(1)
    return Gen2Embed("gen2embed-mini", device="cpu")


NAMES = [name for name, _ in pictures()]


def bulk(
    model: Gen2Embed, images: ImageSource, folder: Path, names: list[str], options: ImageOptions | None = None
) -> np.ndarray:
    encoder = BulkEncoder(
        PrefixEncoder(model), EmbeddingStore(folder, {"model": "mini"}), images, image_options=options
    )
    items = [Item("", (name,)) for name in names]
    encoder.add("document", items)
    return encoder.vectors("document", items)


def test_six_paths_give_one_vector(model: Gen2Embed, folder: Path, tmp_path: Path) -> None:
    source = ImageSource(folder)
    expected = model.encode_document([folder / name for name in NAMES], batch_size=1)
    found = {"evaluate": bulk(model, source, tmp_path / "evaluate", NAMES)}

    cache = CachedImages(None, tmp_path / "cache")
    found["sample"] = bulk(
        model, cache, tmp_path / "sample", [cache.keep((folder / name).read_bytes()) for name in NAMES]
    )

    reader = CellReader(model, source, ImageOptions())
    with torch.no_grad():
        features = [model.forward(reader([{"image": name}], task="document")) for name in NAMES]
    found["train"] = np.concatenate([one["sentence_embedding"].numpy() for one in features])

    engine = Engine(model, batch_tokens=4096, image_options=ImageOptions()).to("cpu")
    batch = engine.prepare("document", [Sample.of("", name) for name in NAMES], source)
    found["vlm2vec"] = engine.forward(tgt={"gen2embed": batch})["tgt_reps"].numpy()

    task = mteb.get_task("MMEB-mini-Scenes_t2i")
    rows = [{"image": [Image.open(folder / name)]} for name in NAMES]
    found["mteb"] = mteb.get_model("gen2embed-mini", device="cpu").encode(
        rows, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=PromptType.document
    )
    for path, vectors in found.items():
        differences = np.abs(np.asarray(vectors) - expected).max(axis=1)
        assert differences.max() < 1e-6, (path, dict(zip(NAMES, differences, strict=True)))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    noise(70, 40).save(buffer, "jpeg", exif=exif)
    return buffer.getvalue()


def test_exif_orientation_is_off_by_default_and_the_same_on_every_path_where_it_is_on(
    model: Gen2Embed, tmp_path: Path
) -> None:
    """All eight orientations; the oracle turns them by Pillow, and saves them without EXIF data."""
    names = [f"{orientation}.jpg" for orientation in range(1, 9)]
    upright = []
    for name in names:
        (tmp_path / name).write_bytes(turned(int(name[0])))
        upright.append(ImageOps.exif_transpose(Image.open(tmp_path / name).convert("RGB")))
        lying = Image.open(tmp_path / name)
        assert open_image(tmp_path / name).tobytes() == lying.convert("RGB").tobytes()
    options = ImageOptions(exif_orientation=True)
    source = ImageSource(tmp_path, exif_orientation=True)
    expected = model.encode_document(upright, batch_size=1)
    turning = Gen2Embed("gen2embed-mini", device="cpu", exif_orientation=True)
    found = {
        "path": turning.encode_document([tmp_path / name for name in names], batch_size=1),
        "PIL image": turning.encode_document([Image.open(tmp_path / name) for name in names], batch_size=1),
        "stored": turning.encode_document([{"bytes": (tmp_path / name).read_bytes()} for name in names], batch_size=1),
        "bulk": bulk(model, source, tmp_path / "bulk", names, options),
    }
    with torch.no_grad():
        reader = CellReader(model, source, options)
        cells = [model.forward(reader([{"image": name}], task="document")) for name in names]
    found["train"] = np.concatenate([one["sentence_embedding"].numpy() for one in cells])
    engine = Engine(model, batch_tokens=4096, image_options=options).to("cpu")
    batch = engine.prepare("document", [Sample.of("", (tmp_path / name).read_bytes()) for name in names], None)
    found["vlm2vec"] = engine.forward(tgt={"gen2embed": batch})["tgt_reps"].numpy()
    for path, vectors in found.items():
        assert np.abs(np.asarray(vectors) - expected).max() < 1e-6, path
    assert [source.facts(name).size for name in names] == [image.size for image in upright]
    with pytest.raises(ValueError, match="exif_orientation=True cannot be saved"):
        turning.save_pretrained(str(tmp_path / "export"))
    assert fingerprint(turning) != fingerprint(model)


def test_small_sides_can_be_left_alone(model: Gen2Embed, folder: Path) -> None:
    small = Gen2Embed("gen2embed-mini", device="cpu", min_side=0)
    picture = [folder / "64x64.png"]
    assert np.array_equal(model.encode_document(picture), small.encode_document(picture))
    with pytest.raises(ValueError, match="min_side is -1"):
        Gen2Embed("gen2embed-mini", min_side=-1)


def test_one_refused_picture_names_itself(model: Gen2Embed, tmp_path: Path) -> None:
    """Without `min_side` Qwen's processor refuses 402x2: the error names the size and the remedy."""
    noise(402, 2).save(tmp_path / "strip.png")
    bare = Gen2Embed("gen2embed-mini", device="cpu", min_side=0, max_length=64)
    with pytest.raises(ValueError, match=r"402x2.*min_side=28"):
        bare.encode_document([tmp_path / "strip.png"])


def test_sixteen_bits_and_floats_are_scaled_by_what_the_file_states(tmp_path: Path) -> None:
    values = np.array([[0, 2048, 4095]], dtype=np.int32)
    (tmp_path / "i.tif").write_bytes(stated_range(Image.fromarray(values), 0, 4095))
    (tmp_path / "f.tif").write_bytes(stated_range(Image.fromarray((values / 4095).astype(np.float32)), 0.0, 1.0))
    for name in ("i.tif", "f.tif"):
        assert [pixel[0] for pixel in open_image(tmp_path / name).get_flattened_data()] == [0, 128, 255]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.array([[0, 300]], dtype=np.int32)),
        Image.fromarray(np.array([[-1, 5]], dtype=np.int32)),
        Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)),
        Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)),
        Image.fromarray(np.array([[0.0, np.inf]], dtype=np.float32)),
    ],
    ids=["I above 255", "I below 0", "F in 0…1", "NaN", "infinity"],
)
def test_a_range_that_nothing_states_is_refused(model: Gen2Embed, image: Image.Image) -> None:
    with pytest.raises(ImageError, match="convert it to"):
        model.encode_document([{"image": image}])


NO_INPUTS = [
    float("nan"),
    7,
    True,
    np.zeros(3),
    np.zeros((2, 2, 3), dtype=np.uint8),
    torch.zeros(3),
    pd.NA,
    pd.NaT,
    None,
    b"bytes",
    {1, 2},
    object(),
]


@pytest.mark.parametrize("value", NO_INPUTS, ids=lambda value: type(value).__name__)
def test_what_is_no_input_is_one_type_error_everywhere(model: Gen2Embed, value: Any) -> None:
    """Before anything looks at the value: an array has no truth, and pandas' NA neither."""
    name = type(value).__name__
    calls = [
        lambda: model.encode([value]),
        lambda: model.encode_query([value, "text"]),
        lambda: model.encode_document(["text", value]),
        lambda: CellReader(model).content(value),
    ]
    if value is not None:
        calls += [
            lambda: model.encode([{"image": value}]),
            lambda: model.encode([{"text": value}]),
            lambda: model.encode([{"text": "t", "images": [value]}]),
            lambda: CellReader(model).content({"text": "t", "image": value}),
        ]
    for call in calls:
        with pytest.raises(TypeError, match=name.rstrip("e")):
            call()


PAYLOAD = "data:image/png;base64," + "iVBORw0KGgo" * 1000


@pytest.mark.parametrize(
    ("address", "word"),
    [
        (PAYLOAD, "base64"),
        ("https://user:secret@example.org/a.png?token=s3cr3t", "download it"),
        ("HTTP://example.org/a.png", "download it"),
        ("s3://bucket/a.png", "download it"),
        ("file:///etc/passwd", "download it"),
    ],
)
def test_addresses_are_refused_and_never_shown(model: Gen2Embed, tmp_path: Path, address: str, word: str) -> None:
    for call in (
        lambda: model.encode([{"image": address}]),
        lambda: ImageSource(tmp_path).open(address),
        lambda: ImageSource(tmp_path).facts(address),
        lambda: CellReader(model).content({"image": address}),
    ):
        with pytest.raises(ImageError, match=word) as caught:
            call()
        assert len(str(caught.value)) < 400
        assert "s3cr3t" not in str(caught.value) and "secret" not in str(caught.value)


def test_closed_and_truncated_pil_images_are_image_errors(model: Gen2Embed, tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "a.png")
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    for image in (closed, Image.open(tmp_path / "b.png")):
        with pytest.raises(ImageError, match="damaged"):
            model.encode([{"image": image}])


def hub_cache(root: Path) -> Path:
    """A snapshot as the hub's client lays it out; returns its folder."""
    repository = root / "datasets--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (snapshot / "pictures").mkdir(parents=True)
    (repository / "blobs").mkdir()
    noise(32, 32).save(root / "a.png")
    (root / "a.png").rename(repository / "blobs" / "e3b0c44298fc")
    (snapshot / "pictures" / "a.png").symlink_to(Path("../../../blobs/e3b0c44298fc"))
    return snapshot


def test_links_of_the_hub_s_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    for root, path in ((snapshot, "pictures/a.png"), (snapshot / "pictures", "a.png")):
        assert ImageSource(root).open(path).size == (32, 32)
        assert ImageSource(root).facts(path).size == (32, 32)


def test_other_links_out_are_followed_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path)
    other = tmp_path / "datasets--org--other" / "blobs"
    other.mkdir(parents=True)
    noise(8, 8).save(other / "b.png")
    (snapshot / "b.png").symlink_to(other / "b.png")
    disk = tmp_path / "disk"
    disk.mkdir()
    noise(9, 9).save(disk / "c.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "linked").symlink_to(disk)
    for root, path in ((snapshot, "b.png"), (folder, "linked/c.png")):
        with pytest.raises(ImageError, match="--follow_links"):
            ImageSource(root).open(path)
        assert ImageSource(root, follow_links=True).open(path).size in ((8, 8), (9, 9))
    # What the data says is never followed out, whatever the user's links are.
    for path in ("../disk/c.png", "linked/../../disk/c.png", str(disk / "c.png")):
        with pytest.raises(ImageError, match="leads outside"):
            ImageSource(folder, follow_links=True).open(path)
    model = Gen2Embed("gen2embed-mini", device="cpu", image_root=str(folder))
    with pytest.raises(ImageError, match="--follow_links"):
        model.encode([{"image": "linked/c.png"}])
    monkeypatch.setenv("GEN2EMBED_FOLLOW_LINKS", "1")
    assert model.encode([{"image": "linked/c.png"}]).shape == (1, 192)


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "socket"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    import socket

    path = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        held = socket.socket(socket.AF_UNIX)
        held.bind(str(path))
    for follow in (False, True):
        source = ImageSource(tmp_path, follow_links=follow)
        for read in (source.open, source.facts):
            with pytest.raises(ImageError, match=r"not a regular file|leads outside"):
                read("x.png")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(path)
    with pytest.raises(FileNotFoundError) if kind != "folder" else pytest.raises(ImageError):
        ImageSource(path).open("a.png")


def test_a_name_that_no_file_can_have_is_an_image_error(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "a.png")
    for source in (ImageSource(tmp_path), ImageSource(tmp_path / "i.zip")):
        for name in ("\ud83d.png", "a\0b.png", "x" * 5000, "", "a.png/b.png"):
            with pytest.raises(ImageError) as caught:
                source.open(name)
            assert str(caught.value).encode()  # it can be written into a report


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_broken_member_is_an_image_error(tmp_path: Path, method: int) -> None:
    noise(40, 40).save(tmp_path / "a.png")
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(tmp_path / "a.png", "a.png")
        archive.write(tmp_path / "a.png", "b.png")
    data = bytearray(path.read_bytes())
    start = data.find(b"a.png") + 5
    whole = bytes(data)
    fallen = 0
    for place in range(start, start + 400, 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        source = ImageSource(path)
        try:
            source.open("a.png")
        except ImageError:
            fallen += 1
        assert source.open("b.png").size == (40, 40)
    assert fallen > 40


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "jpeg", progressive=True)
    data = buffer.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * number + data[-2:]


def test_the_scans_of_a_jpeg_are_counted(tmp_path: Path) -> None:
    (tmp_path / "few.jpg").write_bytes(jpeg_of_scans(1))
    (tmp_path / "many.jpg").write_bytes(jpeg_of_scans(200))
    source = ImageSource(tmp_path)
    assert source.open("few.jpg").size == (64, 64)
    for read in (source.open, source.facts):
        with pytest.raises(ImageError, match="more than 100 scans"):
            read("many.jpg")


def png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + bytes(-(-width // 8))) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_the_pixel_limit_holds_after_enlarging_and_already_for_sizes(model: Gen2Embed, tmp_path: Path) -> None:
    """1,000,000 x 1 would become 1,000,000 x 5,000."""
    (tmp_path / "a.png").write_bytes(png_header(1_000_000, 1))
    (tmp_path / "b.png").write_bytes(png_header(200, 2))
    with pytest.raises(ImageError, match="1000000x1 pixels, which must be enlarged to 1000000x5000"):
        fitted_size((1_000_000, 1), ImageOptions())
    images = ImageSource(tmp_path)
    encoder = BulkEncoder(PrefixEncoder(model), EmbeddingStore(tmp_path / "store", {"model": "mini"}), images)
    items = [Item("", ("a.png",)), Item("", ("b.png",))]
    encoder.add("document", items)
    fault = encoder.fault("document", items[0])
    assert fault is not None and "must be enlarged" in fault.reason
    assert encoder.vectors("document", items[1:]).shape == (1, 192)
    for call in (
        lambda: model.encode([tmp_path / "a.png"]),
        lambda: CellReader(model, images, ImageOptions()).content({"image": "a.png"}),
        lambda: Engine(model, batch_tokens=1024, image_options=ImageOptions()).sorted_order(
            "document", [Sample.of("", "a.png")], images
        ),
    ):
        with pytest.raises(ImageError, match="must be enlarged"):
            call()


def test_a_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(40 * 2**30)
    for read in (ImageSource(tmp_path).open, ImageSource(tmp_path).facts):
        with pytest.raises(ImageError, match=f"{40 * 2**30} bytes exceed the limit of {256 * 2**20}"):
            read("a.jpg")


def test_batches_hold_a_bounded_number_of_pixels() -> None:
    large = 9000 * 9000
    cuts = cut_batches([10] * 24, 8192, 512, [large] * 24)
    assert cuts == [(number, number + 1) for number in range(24)] if large * 2 > MAX_PIXELS_IN_FLIGHT else True
    assert all((stop - start) * large <= max(large, MAX_PIXELS_IN_FLIGHT) for start, stop in cuts)
    assert cut_batches([10] * 24, 8192, 512, [100] * 24) == cut_batches([10] * 24, 8192, 512)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_large_pictures_stay_within_a_limit_of_memory(tmp_path: Path) -> None:
    """Two of seven pictures may be decoded at a time: about 112 MiB of pixels and copies; all at once take 245."""
    for number in range(7):
        Image.new("L", (2000, 2000), number).save(tmp_path / f"{number}.png", compress_level=1)
    code = f"""
import torch
from peak_memory import peak_memory
torch.set_num_threads(1)
from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk import pipeline
pipeline.MAX_PIXELS_IN_FLIGHT = 8_000_000
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
model = Gen2Embed("gen2embed-mini", device="cpu", max_length=128)
model.encode("warm")
before = peak_memory()
store, images = EmbeddingStore({str(tmp_path / "store")!r}, {{}}), ImageSource({str(tmp_path)!r})
bulk = BulkEncoder(PrefixEncoder(model), store, images)
items = [Item("", (f"{{n}}.png",)) for n in range(7)]
bulk.add("document", items)
assert bulk.vectors("document", items).shape == (7, 192)
print(peak_memory() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 180 * 2**20
