"""The datasets of images with captions, and reading them in the layouts in which they are published.

    Flickr30K   royokong/flickr30k_test: Parquet, columns image and text (a list of captions)
    COCO        royokong/coco_test: the same; the first five captions of an image count
    ShareGPT4V  share-captioner_coco_lcs_sam_1246k_1107.json: the first 1,000 entries
    Urban1K     Urban1k/caption/N.txt and Urban1k/image/N.jpg, as folders or in Urban1k.zip

Each is a local folder, or for all but ShareGPT4V a dataset on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

from gen2embed_mteb.data_files.rows import RowFault, RowLimits, checked_path, checked_text
from gen2embed_mteb.data_files.shards import DataError
from gen2embed_mteb.errors import one_line
from gen2embed_mteb.hub.addresses import HUB_ID, TABLES, local_place, split_revision
from gen2embed_mteb.images.cached_images import EMBEDDED, CachedImages

Form = Literal["parquet", "sharegpt4v", "urban1k"]
MOST_CAPTIONS = 5
"""Captions of an image that count; a few images of COCO have more."""
_READ = 2**20


@dataclass(frozen=True)
class CaptionDataset:
    """A dataset of images with captions.

    Attributes:
        name: Its name on the command line and in reports.
        title: Its name in tables.
        form: The layout of its files.
        hub_id: Where it is on the hub.
        file: The name of its file, where it is one.
        folders: Names of its folder below the folder of several datasets.
        limit: How many of its images are used, from the first; `None`: all.
    """

    name: str
    title: str
    form: Form
    hub_id: str
    file: str = ""
    folders: tuple[str, ...] = ()
    limit: int | None = None


FLICKR30K = CaptionDataset(
    "flickr30k", "Flickr30K", "parquet", "royokong/flickr30k_test", folders=("flickr30k_test", "flickr30k")
)
COCO = CaptionDataset("coco", "COCO 5k", "parquet", "royokong/coco_test", folders=("coco_test", "coco"))
SHAREGPT4V = CaptionDataset(
    "sharegpt4v",
    "ShareGPT4V",
    "sharegpt4v",
    "Lin-Chen/ShareGPT4V",
    file="share-captioner_coco_lcs_sam_1246k_1107.json",
    folders=("ShareGPT4V", "sharegpt4v"),
    limit=1000,
)
URBAN1K = CaptionDataset(
    "urban1k", "Urban1K", "urban1k", "BeichenZhang/Urban1k", file="Urban1k.zip", folders=("Urban1k", "urban1k")
)
DATASETS = (FLICKR30K, COCO, SHAREGPT4V, URBAN1K)


@dataclass(frozen=True)
class CaptionedImage:
    """One image.

    Attributes:
        index: Its number in the dataset, from 0.
        file: The file that names it, for messages.
        image: The path under which the dataset's images find it.
        captions: Its captions.
    """

    index: int
    file: str
    image: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class OpenedDataset:
    """A dataset whose rows can be read.

    Attributes:
        dataset: The dataset.
        source: Its folder, file or hub id, for messages.
        images: Opens its images.
        table: What holds its rows.
    """

    dataset: CaptionDataset
    source: str
    images: CachedImages
    table: Any

    def rows(self, limit: int | None) -> Iterator[tuple[int, Any]]:
        """Yield (number, row) from the first row on, at most `limit`; a row is what `made` takes."""
        most = min((one for one in (limit, self.dataset.limit) if one is not None), default=None)
        for number, row in enumerate(self.table):
            if number == most:
                return
            yield number, row

    def made(self, number: int, row: Any, limits: RowLimits) -> CaptionedImage:
        """Return a row's image and captions.

        Raises:
            RowFault: The row cannot be used; the message says why.
        """
        image, captions, file = _PARTS[self.dataset.form](row, self.images)
        if not isinstance(image, str) or not image:
            raise RowFault("its image has neither bytes nor a path")
        if not isinstance(captions, (list, tuple)) or not captions:
            raise RowFault("it has no captions")
        texts = tuple(checked_text(_text(one), "caption", limits) for one in captions[:MOST_CAPTIONS])
        path = image if image.startswith(EMBEDDED) else checked_path(image, "image", limits)
        return CaptionedImage(number, file or self.source, path, texts)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowFault("a caption is missing, empty or not a string")
    return value


def open_dataset(dataset: CaptionDataset, data_dir: str, image_dir: str, cache: Path, **options: Any) -> OpenedDataset:
    """Open a dataset.

    Args:
        dataset: The dataset.
        data_dir: Its folder, the folder of several datasets, or a hub id.
        image_dir: Where the images of ShareGPT4V are; for the others, empty.
        cache: The folder into which images are written that are embedded in tables.
        options: As for `ImageSource`.

    Raises:
        DataError: The folder does not hold the dataset.
        FileNotFoundError: There is no such folder of images.
    """
    root = _root(dataset, data_dir)
    if dataset.form == "parquet":
        images = CachedImages(None, cache, **options)
        table = _hub_table(data_dir) if root is None else _parquet_rows(dataset, root)
        return OpenedDataset(dataset, str(root or data_dir), images, table)
    if dataset.form == "urban1k":
        place = _fetched(dataset, data_dir) if root is None else _urban_place(dataset, root)
        table = _urban_names(place)
        images = CachedImages(place, cache, **options)
        return OpenedDataset(dataset, str(place), images, table)
    if root is None:
        raise DataError(
            f"{data_dir} is no local folder: {dataset.title} needs {dataset.file} in --data_dir, and its pictures, "
            "which are not on the hub, in --image_dir"
        )
    path = root if root.is_file() else root / dataset.file
    if not path.is_file():
        raise DataError(f"{root}: no {dataset.file}; pass the folder that holds it as --data_dir")
    pictures = Path(image_dir).expanduser() if image_dir else path.parent
    return OpenedDataset(dataset, str(path), CachedImages(pictures, cache, **options), json_entries(path))


def is_there(dataset: CaptionDataset, data_dir: str) -> bool:
    """Return whether a folder of several datasets holds this one."""
    root = local_place(data_dir)
    return any((root / name).exists() for name in _names(dataset))


def _names(dataset: CaptionDataset) -> tuple[str, ...]:
    return (*dataset.folders, *([dataset.file] if dataset.file else []))


def _root(dataset: CaptionDataset, data_dir: str) -> Path | None:
    """Return the local folder or file of a dataset; `None` for a hub id."""
    root = local_place(data_dir, (*TABLES, *([dataset.file] if dataset.file else [])))
    if not root.exists():
        if HUB_ID.fullmatch(data_dir):
            return None
        raise DataError(f"{data_dir}: no such folder; pass {dataset.title}'s, or the hub id {dataset.hub_id}")
    for name in dataset.folders:
        if (root / name).is_dir() and dataset.form != "urban1k":
            return root / name
    return root


def _parquet_rows(dataset: CaptionDataset, root: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    files = sorted(path for folder in (root, root / "data") for path in folder.glob("*.parquet"))
    test = [path for path in files if path.name.startswith("test")]
    files = test or files
    if not files:
        raise DataError(f"{root}: no Parquet file; pass a copy of {dataset.hub_id} as --data_dir")
    for path in files:
        try:
            columns = pq.read_schema(path).names
        except Exception as error:  # whatever pyarrow raises follows from the file
            raise DataError(f"{path}: not readable as Parquet ({one_line(error)}); download it again") from error
        missing = {"image", "text"} - set(columns)
        if missing:
            raise DataError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(columns)}")
    return _read_parquet(files)


def _read_parquet(files: list[Path]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(16, columns=["image", "text"]):
            for row in batch.to_pylist():
                yield {**row, "file": str(path)}


def _hub_table(hub_id: str) -> Iterator[Any]:
    import datasets

    name, revision = split_revision(hub_id)
    loaded = datasets.load_dataset(name, split="test", revision=revision)
    table = loaded.cast_column("image", datasets.Image(decode=False))
    return iter(table.select_columns(["image", "text"]))


def _fetched(dataset: CaptionDataset, hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, revision = split_revision(hub_id)
    return Path(hf_hub_download(name, dataset.file, repo_type="dataset", revision=revision))


def _urban_place(dataset: CaptionDataset, root: Path) -> Path:
    """Return the folder or archive in which `caption/` and `image/` are, below `Urban1k/` or not."""
    for place in (root, root / "Urban1k", root / "urban1k"):
        if (place / "caption").is_dir() and (place / "image").is_dir():
            return place
    for place in (root, root / dataset.file):
        if place.is_file() and place.suffix == ".zip":
            return place
    raise DataError(f"{root}: neither the folders caption and image nor {dataset.file}; pass {dataset.title}'s folder")


def _urban_names(place: Path) -> Iterator[Any]:
    """Return rows of Urban1K by number: (caption or fault, path of the image, file of the caption)."""
    if place.is_dir():
        captions = {path.stem: path for path in (place / "caption").glob("*.txt")}
        images = {path.stem: f"image/{path.name}" for path in sorted((place / "image").iterdir()) if path.is_file()}
        read: dict[str, Callable[[], bytes]] = {stem: path.read_bytes for stem, path in captions.items()}
        names = {stem: str(path) for stem, path in captions.items()}
    else:
        try:
            archive = ZipFile(place)
            entries = [PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")]
        except (BadZipFile, OSError) as error:
            raise DataError(f"{place}: not readable as a ZIP archive ({one_line(error)}); download it again") from error
        found = {one.stem: str(one) for one in entries if one.parent.name == "caption" and one.suffix == ".txt"}
        images = {one.stem: str(one) for one in entries if one.parent.name == "image"}
        read = {stem: partial(archive.read, name) for stem, name in found.items()}
        names = {stem: f"{place}/{name}" for stem, name in found.items()}
    if not read:
        raise DataError(f"{place}: no captions; pass Urban1K's folder or archive")
    order = sorted(read, key=lambda stem: (int(stem) if stem.isdigit() else 10**9, stem))
    return ({"read": read[stem], "image": images.get(stem), "file": names[stem]} for stem in order)


def json_entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list one by one: the file of ShareGPT4V has 1.2 million, of which few are used.

    Raises:
        DataError: The file is no list of JSON objects.
    """
    decoder, buffer, begun = json.JSONDecoder(), "", False
    with path.open(encoding="utf-8-sig") as file:
        while True:
            part = file.read(_READ)
            buffer += part
            while True:
                buffer = buffer.lstrip(" \t\r\n,")
                if not begun and buffer:
                    if buffer[0] != "[":
                        raise DataError(f"{path}: expected a JSON list; download it again")
                    begun, buffer = True, buffer[1:]
                    continue
                if buffer.startswith("]"):
                    return
                try:
                    entry, end = decoder.raw_decode(buffer)
                except (ValueError, RecursionError) as error:
                    if part:
                        break  # the entry goes on in the next part
                    raise DataError(f"{path}: not readable as JSON ({one_line(error)}); download it again") from error
                yield entry
                buffer = buffer[end:]


def _of_parquet(row: Any, images: CachedImages) -> tuple[Any, Any, str]:
    image = row["image"] or {}
    data = image.get("bytes") if isinstance(image, dict) else None
    path = images.keep(data) if data else None
    return path, row["text"], str(row.get("file", ""))


def _of_sharegpt4v(row: Any, images: CachedImages) -> tuple[Any, Any, str]:
    if not isinstance(row, dict):
        raise RowFault("it is no JSON object")
    said = row.get("conversations")
    answer = said[1] if isinstance(said, list) and len(said) > 1 else None
    text = answer.get("value") if isinstance(answer, dict) else None
    return row.get("image"), [text.replace("\n", " ")] if isinstance(text, str) else [], ""


def _of_urban1k(row: Any, images: CachedImages) -> tuple[Any, Any, str]:
    try:
        text = row["read"]().decode("utf-8-sig")
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise RowFault(f"its caption cannot be read ({one_line(error)})") from error
    lines = text.splitlines()
    return row["image"], lines[:1], row["file"]


_PARTS = {"parquet": _of_parquet, "sharegpt4v": _of_sharegpt4v, "urban1k": _of_urban1k}
