"""Opening images: every kind that benchmarks hold becomes RGB, every bad kind an error that names file and remedy."""

import io
import multiprocessing
import os
import pickle
import signal
import struct
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gen2embed_mteb.images.decoding import image_digest, open_image
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.resizing import ensure_min_side, resize
from gen2embed_mteb.images.source import ImageSource

GRADIENT = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)


def picture(mode: str) -> Image.Image:
    """A 16x12 picture of the mode, its content known."""
    grey = Image.fromarray(GRADIENT)
    if mode == "I;16":
        return Image.fromarray(GRADIENT.astype(np.uint16) * 256)
    if mode == "RGBA":
        image = Image.merge("RGB", (grey, grey, grey)).convert("RGBA")
        image.putalpha(7)
        return image
    if mode == "LA":
        return Image.merge("LA", (grey, Image.new("L", grey.size, 7)))
    return grey.convert("RGB").convert(mode) if mode != "L" else grey


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("I;16", "png"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "tiff")],
)
def test_every_mode_becomes_the_same_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    picture(mode).save(path, lossless=True) if suffix == "webp" else picture(mode).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    # Grey, alpha of 7 (dropped, not blended) and 16 bits (high byte kept) all show the same gradient.
    assert np.array_equal(np.asarray(opened), np.stack([GRADIENT] * 3, axis=-1))


def test_cmyk_jpeg_and_palette_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red = np.asarray(open_image(tmp_path / "c.jpg"))[4, 4].astype(int)
    assert red[0] > 240
    assert red[1:].max() < 15

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns when such a palette is converted directly
        assert np.asarray(open_image(tmp_path / "p.png")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_and_exif_orientation(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
    assert open_image(tmp_path / "one.png").size == (1, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: the reference clients do not
    Image.new("RGB", (6, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (6, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])  # above our limit, above Pillow's error, far above both
def test_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(ImageError, match=r"bomb\.png.*(exceed|bomb).*shrink"):
        open_image(tmp_path / "bomb.png")


def test_bomb_warnings_turned_errors_are_image_errors(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(9_500, 9_500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="bomb"):
            open_image(tmp_path / "bomb.png")


def test_pixel_limit_is_the_callers(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10x10 pixels exceed the limit of 99"):
        open_image(tmp_path / "x.png", max_pixels=99)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tiff"])
def test_truncated_files_are_damaged(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}.*download it again"):
        open_image(path)


def test_formats_nobody_named_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.ppm")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("x.ppm", "text.png", "empty.png"):
        with pytest.raises(ImageError, match="not one of JPEG"):
            open_image(tmp_path / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with one image inside and one outside."""
    (tmp_path / "root" / "sub").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "root" / "sub" / "in.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "root" / "linked").symlink_to(tmp_path)
    (tmp_path / "root" / "inner.png").symlink_to("sub/in.png")
    (tmp_path / "root" / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "root" / "pipe.png")
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../outside.png", "outside of"),
        ("sub/../../outside.png", "outside of"),
        ("link.png", "outside of"),
        ("linked/outside.png", "outside of"),
        ("/etc/hostname", "outside of"),
        ("sub/none.png", "not found"),
        ("sub", "not a regular file"),
        ("", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("loop.png", "unusable path"),
        ("x" * 5000, "unusable path"),
        ("nul\0.png", "unusable path"),
    ],
)
def test_paths_are_confined_to_the_root(root: Path, path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path, root)
    assert caught.value.file == (path if len(path) < 256 else f"{path[:60]}… (5000 characters)")
    with pytest.raises(ImageError, match=reason):
        ImageSource(root).open(path)
    with pytest.raises(ImageError, match=reason):
        ImageSource(root).facts(path)


def test_links_and_absolute_paths_inside_the_root_are_fine(root: Path) -> None:
    for path in ("inner.png", "sub/in.png", str(root / "sub" / "in.png"), "linked/root/sub/in.png"):
        assert open_image(path, root).size == (4, 4)


def test_missing_file_without_root(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not found"):
        open_image(tmp_path / "none.png")


def test_image_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "damaged", "download it again")))
    assert (error.file, error.reason, str(error)) == (
        "a.png",
        "damaged",
        "image 'a.png': damaged; download it again",
    )


# --- sources ---------------------------------------------------------------------------------------------------------


def make_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def png(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_zip_gives_what_the_folder_gives(tmp_path: Path) -> None:
    members = {f"Foo/{n}.png": png((n, 2 * n, 255 - n), (n + 1, 3)) for n in range(40)}
    archive = make_zip(tmp_path / "images.zip", members)
    with zipfile.ZipFile(archive) as unpacked:
        unpacked.extractall(tmp_path / "dir")
    zipped, folder = ImageSource(archive), ImageSource(tmp_path / "dir")
    for name in members:
        assert image_digest(zipped.open(name)) == image_digest(folder.open(name))
        assert zipped.facts(name) == folder.facts(name)
    assert zipped.facts("Foo/1.png").size == (2, 3)
    assert len({zipped.facts(name).digest for name in members}) == len(members)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("../x.png", "outside"), ("/Foo/x.png", "outside"), ("", "outside"), ("Foo/none.png", "not found")],
)
def test_zip_refuses_other_paths(tmp_path: Path, path: str, reason: str) -> None:
    source = ImageSource(make_zip(tmp_path / "i.zip", {"Foo/x.png": png((1, 2, 3))}))
    with pytest.raises(ImageError, match=reason):
        source.open(path)
    with pytest.raises(ImageError, match=reason):
        source.facts(path)


def test_zip_bombs_are_refused_unread(tmp_path: Path) -> None:
    source = ImageSource(make_zip(tmp_path / "i.zip", {"b.png": b"\0" * 2_000_000}), max_file_bytes=1_000_000)
    with pytest.raises(ImageError, match="2000000 bytes unpacked exceed the limit of 1000000"):
        source.open("b.png")


def test_zip_members_are_checked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "i.zip", {"x.png": png((9, 9, 9))}, zipfile.ZIP_STORED)
    data = bytearray(archive.read_bytes())
    data[45] ^= 0xFF  # inside the stored image: the checksum no longer fits
    archive.write_bytes(bytes(data))
    with pytest.raises(ImageError, match=r"damaged in .*i\.zip"):
        ImageSource(archive).open("x.png")


def test_sources_must_exist(tmp_path: Path) -> None:
    (tmp_path / "fake.zip").write_text("no archive")
    for name, reason in (("fake.zip", "not a zip archive"), ("none", "no such folder")):
        with pytest.raises(FileNotFoundError, match=reason):
            ImageSource(tmp_path / name)


def _digests(source: ImageSource, names: list[str]) -> list[str]:
    return [image_digest(source.open(name)) for name in names]


def test_zip_from_threads_and_after_a_fork(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(60)]
    source = ImageSource(make_zip(tmp_path / "i.zip", {n: png((int(n[:-4]), 1, 2), (50, 50)) for n in names}))
    expected = _digests(source, names)
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(_digests(source, names))) for _ in range(4)]
    for thread in threads:
        thread.start()
    # Fork while the threads hold and move the shared archive.
    with multiprocessing.get_context("fork").Pool(2) as pool:
        forked = pool.starmap(_digests, [(source, names)] * 2, chunksize=1)
    for thread in threads:
        thread.join()
    assert results == [expected] * 4
    assert forked == [expected] * 2


def test_zip_inherited_through_a_fork(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(5)]
    source = ImageSource(make_zip(tmp_path / "i.zip", {n: png((int(n[:-4]), 1, 2)) for n in names}))
    expected = _digests(source, names)
    archive = source._open_archive()
    with source._lock:  # as if another thread held it at the moment of the fork
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)  # waiting for that thread would never end
            # A handle of one's own: the inherited one shares its position with the parent.
            fine = _digests(source, names) == expected and source._open_archive() is not archive
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (640, 480)),  # nothing to do
        ((2000, 1500), (992, 744)),  # 992 / 2000
        ((300, 200), (504, 336)),  # 336 / 200
        ((1000, 100), (992, 496)),  # shorter side stretched to 500, then 992 / 1000
        ((100, 1000), (496, 992)),
        ((200, 20), (672, 336)),  # stretched to 100, then 336 / 100
        ((1, 1), (336, 336)),
        ((1200, 601), (992, 496)),  # 601 * 992 / 1200 = 496.8, cut to 496
    ],
)
def test_official_policy(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize(Image.new("RGB", size), "official").size == expected


def test_other_policies() -> None:
    image = Image.new("RGB", (30, 500))
    assert resize(image) is image
    assert resize(image, "square-448").size == (448, 448)
    with pytest.raises(ValueError, match="'half'; known: processor, official, square-448"):
        resize(image, "half")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), (28, 28)),
        ((1, 1), (28, 28)),
        ((20, 30), (28, 42)),
        ((14, 100), (28, 200)),
        ((27, 28), (28, 29)),
        ((1, 1000), (28, 5600)),  # 1 stretched to 5, then all times 28 / 5
        ((40, 10_000), (50, 10_000)),  # wide enough, but 250 to 1
    ],
)
def test_min_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert ensure_min_side(Image.new("RGB", size)).size == expected


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 2000), height=st.integers(1, 2000), min_side=st.integers(1, 40))
def test_min_side_always_suits_the_processor(width: int, height: int, min_side: int) -> None:
    image = Image.new("L", (width, height))
    out = ensure_min_side(image, min_side)
    assert min(out.size) >= min_side
    assert max(out.size) <= 200 * min(out.size)
    if min(width, height) >= min_side and max(width, height) <= 200 * min(width, height):
        assert out is image
    assert (out.width >= width) and (out.height >= height)


def test_min_side_off_and_wrong() -> None:
    image = Image.new("RGB", (1, 1))
    assert ensure_min_side(image, 0) is image
    with pytest.raises(ValueError, match="min_side is -1"):
        ensure_min_side(image, -1)


def test_digest_covers_size_mode_and_palette() -> None:
    flat = Image.new("L", (2, 8), 5)
    first, second = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    first.putpalette([1, 2, 3])
    second.putpalette([4, 5, 6])
    images = [flat, Image.new("L", (8, 2), 5), Image.new("P", (2, 8), 5), Image.new("L", (2, 8), 6), first, second]
    assert len({image_digest(image) for image in images}) == len(images)
    assert image_digest(flat) == image_digest(Image.new("L", (2, 8), 5))
