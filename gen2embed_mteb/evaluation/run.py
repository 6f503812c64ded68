"""Code that all evaluation runs share: opening images and stored vectors, rejected rows, versions of packages."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.config import EncodingConfig, EvaluationConfig
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.hub.addresses import EVERYTHING, local_place
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.source import ImageSource

ROWS_SEARCHED = 100
"""How many rows at the beginning of a table are searched for images, before a model of text alone encodes it."""
VERSIONED = ("gen2embed", "torch", "transformers", "sentence-transformers", "numpy", "pillow", "pyarrow")


class RowError(NamedTuple):
    """A row that was set aside: it is counted and reported, but not scored."""

    dataset: str
    row: int
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The part of a run's result that all benchmarks share.

    Attributes:
        num_scored: The number of scored rows.
        errors: The rows that were set aside, in order.
        seconds: The wall-clock time of this run.
        max_error_rate: The largest accepted share of rejected rows.
    """

    errors_file: ClassVar[str] = "errors.jsonl"
    """The file that lists the rows that were set aside."""
    num_scored: int
    errors: tuple[RowError, ...]
    seconds: float
    max_error_rate: float

    @property
    def error_rate(self) -> float:
        """The share of rows that were set aside."""
        return len(self.errors) / max(1, len(self.errors) + self.num_scored)

    @property
    def too_many_errors(self) -> bool:
        """Whether the run counts as failed; the command line then exits with a status other than 0."""
        return self.error_rate > self.max_error_rate

    @property
    def verdict(self) -> str:
        """The message of the command line about rows that were set aside; empty if there are none."""
        if not self.errors:
            return ""
        share = (
            f"{len(self.errors)} of {len(self.errors) + self.num_scored} rows were set aside, see {self.errors_file}"
        )
        if not self.too_many_errors:
            return share
        return f"Failed: {share}; that is more than --max_error_rate {self.max_error_rate:g}"


def image_source(config: EvaluationConfig) -> ImageSource:
    """Open the images of a run; see `find_images`."""
    return find_images(
        config.data_dir,
        config.image_dir,
        follow_links=config.follow_links,
        exif_orientation=config.exif_orientation,
        remote_images=config.remote_images,
    )


def find_images(
    data_dir: str,
    image_dir: str = "",
    *,
    follow_links: bool = False,
    exif_orientation: bool = False,
    remote_images: Sequence[str] = (),
) -> ImageSource:
    """Open the images that tables name.

    Args:
        data_dir: The folder of the tables.
        image_dir: The folder or .zip archive of the images, if given; an address of the hub is downloaded.
        follow_links: Whether links in the folder may lead out of it; GEN2EMBED_FOLLOW_LINKS=1 has the same effect.
        exif_orientation: Whether images are turned as their EXIF data says.
        remote_images: Which images may be read from other machines; see `images/remote.py`.

    Returns:
        The images in `image_dir` if given; otherwise those in `images.zip` beside the tables, if it was not unpacked;
        otherwise those in the folder of the tables.

    Raises:
        FileNotFoundError: There is no such folder or archive.
    """
    options: dict[str, Any] = {"follow_links": follow_links or follows_links(), "exif_orientation": exif_orientation}
    options["remote_images"] = remote_images
    if image_dir:
        return ImageSource(local_place(image_dir, EVERYTHING), **options)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{data_dir} is no local folder; pass the images as --image_dir")
    archive = root / "images.zip"
    zipped = archive.is_file() and not (root / "images").is_dir()
    return ImageSource(archive if zipped else root, **options)


def refuse_images(text_alone: str, has_images: Mapping[str, Callable[[], bool]]) -> None:
    """Refuse data with images for a model that takes text alone, before anything is encoded.

    Args:
        text_alone: Why the model takes no images; empty if it takes them, and then nothing is read.
        has_images: For each subset, what tells whether one of its first rows has an image.

    Raises:
        Gen2EmbedError: A subset has images; the message names all of them, and those that can be used.
    """
    if not text_alone:
        return
    found = {name: look() for name, look in has_images.items()}
    refused = [name for name, images in found.items() if images]
    if refused:
        usable = " ".join(name for name, images in found.items() if not images)
        raise Gen2EmbedError(
            f"{text_alone}, and there are images in {', '.join(refused)}: use a multimodal model"
            + (f", or only what has none: --subsets {usable}" if usable else "")
        )


def open_bulk_encoder(
    encoder: Encoder,
    config: EncodingConfig,
    images: ImageSource,
    *,
    folder: Path,
    fingerprint: str,
    share: Share | None = None,
) -> BulkEncoder:
    """Open the stored embeddings of a run to resume it, or begin a new store.

    Args:
        encoder: The model.
        config: The run's settings.
        images: The source of its images.
        folder: The folder of its vectors.
        fingerprint: The digest of everything that decides the model's vectors.
        share: The part of the encoding that belongs to this process; None reads it from the environment.

    Returns:
        The bulk encoder, with the store in that folder.

    Raises:
        StoreMismatchError: The folder holds embeddings of another model, prompt or image policy.
    """
    identity = {"fingerprint": fingerprint, "resize": config.resize, "min_side": str(config.min_side)}
    identity |= {name: str(value) for name, value in config.orientation().items()}
    store = EmbeddingStore(folder, identity, overwrite=config.overwrite)
    return BulkEncoder(
        encoder,
        store,
        images,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        image_options=config.image_options(),
        num_workers=config.num_workers,
        share=share or Share.from_environment(),
    )


def is_first_process() -> bool:
    """Return whether this process writes the reports: the only one, or rank 0 of several (see `bulk.processes`)."""
    return Share.from_environment().rank == 0


def errors_bytes(errors: list[RowError]) -> bytes:
    """Return the content of `errors.jsonl`, one rejected row per line; empty if there are none.

    Args:
        errors: The rejected rows, in order.
    """
    lines = (json.dumps(error._asdict(), ensure_ascii=False) + "\n" for error in errors)
    # The name of a file may hold a lone surrogate, which JSON writes as `\\udXXX`.
    return "".join(lines).encode("utf-8", "backslashreplace")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on; packages that are not installed are left out."""
    versions: dict[str, str] = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
