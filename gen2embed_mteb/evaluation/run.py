"""What every evaluation run shares: configuration, where vectors are kept, rejected rows, provenance."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.processes import Share
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Encoder
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.files import follows_links
from gen2embed_mteb.images.resizing import RESIZE_POLICIES
from gen2embed_mteb.images.source import ImageSource

VERSIONED = ("gen2embed", "torch", "transformers", "sentence-transformers", "numpy", "pillow", "pyarrow")


def setting(text: str, **kwargs: Any) -> Any:
    """A dataclass field with its help text."""
    return field(metadata={"help": text}, **kwargs)


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """How the vectors of a run are made, whatever they are for."""

    batch_tokens: int | None = setting("tokens a call of the model, padding included; None: as suits it", default=None)
    batch_size: int = setting("inputs a call of the model, at most", default=512)
    resize: str = setting("how images are resized before the processor", default="processor")
    min_side: int = setting("least image side in pixels; smaller images are enlarged, 0: never", default=28)
    num_workers: int = setting("threads that open images", default=4)
    max_error_rate: float = setting("share of rejected rows above which the run counts as failed", default=0.001)
    overwrite: bool = setting("drop what another model, prompt or setting made in output_dir", default=False)

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        for name in ("batch_tokens", "batch_size", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Gen2EmbedError(f"{name} is {value}; pass 1 or more")
        if self.min_side < 0:
            raise Gen2EmbedError(f"min_side is {self.min_side}; pass 0 or more")
        if not 0 <= self.max_error_rate <= 1:
            raise Gen2EmbedError(f"max_error_rate is {self.max_error_rate}; pass a share between 0 and 1")
        if self.resize not in RESIZE_POLICIES:
            raise Gen2EmbedError(f"resize is {self.resize!r}; known: {', '.join(RESIZE_POLICIES)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EncodingConfig, RowLimits):
    """The settings of one evaluation run."""

    data_dir: str = setting("folder (or Hub id) of the benchmark's tables")
    output_dir: str = setting("folder for embeddings, scores and reports; made if missing")
    image_dir: str = setting("folder or .zip archive of the images; empty: beside the tables", default="")
    follow_links: bool = setting("follow links that lead out of the image folder", default=False)
    split: str = setting("split to evaluate", default="test")
    subsets: tuple[str, ...] = setting("datasets to run; empty: all", default=())
    meta_tasks: tuple[str, ...] = setting("meta-tasks to run; empty: all", default=())
    limit: int | None = setting("rows a dataset, from the first; None: all", default=None)
    model_name: str = setting("the model, for the reports", default="")
    revision: str = setting("its revision, for the reports", default="")
    prompt_mode: str = setting("the prompt strategy, for the reports", default="hierarchical")
    fingerprint: str = setting(
        "digest of weights and prompts; embeddings are reused only where it is equal", default=""
    )
    leaderboard: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "metadata of the V2 leaderboard file, beyond the model's name"}
    )

    def __post_init__(self) -> None:
        """Checks every value, so that a run never fails on one hours later.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        EncodingConfig.__post_init__(self)
        RowLimits.__post_init__(self)
        if self.limit is not None and self.limit < 1:
            raise Gen2EmbedError(f"limit is {self.limit}; pass 1 or more")
        for name in ("data_dir", "output_dir"):
            if not getattr(self, name):
                raise Gen2EmbedError(f"{name} is empty; pass a folder")
        if not self.fingerprint:
            # Without it the vectors of one model could be taken for those of another.
            raise Gen2EmbedError("fingerprint is empty; pass a digest of the model's weights and prompts")

    @property
    def embedding_dir(self) -> Path:
        """Where the vectors are kept."""
        return Path(self.output_dir) / "embeddings"


class RowError(NamedTuple):
    """A row that was set aside: counted and reported, not scored."""

    dataset: str
    row: int
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What every run's result tells besides its scores.

    Attributes:
        num_scored: The number of scored rows.
        errors: The rows that were set aside, in order.
        seconds: Wall-clock time of this run.
        max_error_rate: The share of rejected rows that was allowed.
    """

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
        """Whether the run counts as failed; a command line exits non-zero then."""
        return self.error_rate > self.max_error_rate

    @property
    def verdict(self) -> str:
        """What a command line says of the rows that were set aside; empty if there are none."""
        if not self.errors:
            return ""
        share = f"{len(self.errors)} of {len(self.errors) + self.num_scored} rows were set aside, see errors.jsonl"
        if not self.too_many_errors:
            return share
        return f"Failed: {share}; that is more than --max_error_rate {self.max_error_rate:g}"


def image_source(config: EvaluationConfig) -> ImageSource:
    """Opens the images of a run; see `find_images`."""
    return find_images(config.data_dir, config.image_dir, follow_links=config.follow_links)


def find_images(data_dir: str, image_dir: str = "", *, follow_links: bool = False) -> ImageSource:
    """Opens the images that tables name.

    Args:
        data_dir: The tables' folder.
        image_dir: The images' folder or .zip archive, if it is said.
        follow_links: Whether links in the folder may lead out of it; GEN2EMBED_FOLLOW_LINKS=1 says the same.

    Returns:
        `image_dir` if given; otherwise `images.zip` beside the tables where it was never unpacked, or their folder.

    Raises:
        FileNotFoundError: There is nothing of that kind.
    """
    follow_links = follow_links or follows_links()
    if image_dir:
        return ImageSource(Path(image_dir).expanduser(), follow_links=follow_links)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{data_dir} is no local folder; pass the images as --image_dir")
    archive = root / "images.zip"
    zipped = archive.is_file() and not (root / "images").is_dir()
    return ImageSource(archive if zipped else root, follow_links=follow_links)


def open_bulk_encoder(
    encoder: Encoder,
    config: EncodingConfig,
    images: ImageSource,
    *,
    folder: Path,
    fingerprint: str,
    share: Share | None = None,
) -> BulkEncoder:
    """Opens the embeddings of a run for resuming, or begins them.

    Args:
        encoder: The model.
        config: The run's settings.
        images: Where its images lie.
        folder: Where its vectors are kept.
        fingerprint: Digest of everything that decides the model's vectors.
        share: Which part of the encoding is this process's; None: what the environment says.

    Returns:
        The bulk encoder, on the store in that folder.

    Raises:
        StoreMismatchError: The folder holds embeddings of another model, prompt or image policy.
    """
    identity = {"fingerprint": fingerprint, "resize": config.resize, "min_side": str(config.min_side)}
    store = EmbeddingStore(folder, identity, overwrite=config.overwrite)
    return BulkEncoder(
        encoder,
        store,
        images,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        resize_policy=config.resize,
        min_side=config.min_side,
        num_workers=config.num_workers,
        share=share or Share.from_environment(),
    )


def is_first_process() -> bool:
    """Whether this process writes the reports: the only one, or rank 0 of several (see `sharing.Share`)."""
    return Share.from_environment().rank == 0


def errors_bytes(errors: list[RowError]) -> bytes:
    """Return `errors.jsonl`, one rejected row a line; empty when there are none.

    Args:
        errors: The rejected rows, in order.
    """
    lines = (json.dumps(error._asdict(), ensure_ascii=False) + "\n" for error in errors)
    # The name of a file may hold a lone surrogate; `\\udXXX` is how JSON writes it.
    return "".join(lines).encode("utf-8", "backslashreplace")


def installed_versions() -> dict[str, str]:
    """The versions of the packages that results depend on; those not installed are left out."""
    versions: dict[str, str] = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
