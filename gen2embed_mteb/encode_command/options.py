"""The flags of `gen2embed encode`; they are listed without loading a model's libraries."""

from __future__ import annotations

from dataclasses import dataclass

from gen2embed_mteb.config import EncodingConfig
from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.distributed.options import EngineOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.names import Side

PICTURES, JSONL, PARQUET, SAVED, STREAM = "pictures", "jsonl", "parquet", "datasets", "stream"
KINDS = (PICTURES, JSONL, PARQUET, SAVED)
PRECISIONS = ("float32", "float16", "int8")
FORMATS = ("parquet", "npy")
ROWS_PER_SHARD = 8192


@dataclass(frozen=True, kw_only=True)
class InputOptions(RowLimits, LinkOption, RemoteOption):
    """Which rows are read, and what of them."""

    input: str = option(
        "folder of pictures, .jsonl or .parquet file, folder of such files, folder of datasets.save_to_disk, or with "
        "--streaming a data set of the hub",
        needs="a file or folder",
    )
    kind: str = option(
        "what a folder is read as, if it holds both pictures and tables", default="", choices=("", *KINDS)
    )
    text_column: str = option("column of the texts; none: no texts (default: found by its name)", default="")
    image_column: str = option(
        "column of the images: paths, bytes, or both as datasets stores them; none: no images (default: found by its "
        "name)",
        default="",
    )
    id_column: str = option("column of the ids; none: the row's number (default: found by its name)", default="")
    image_dir: str = option("folder or .zip archive of images that are paths; default: beside the table", default="")
    streaming: bool = option("read the input from the hub, row by row, without keeping it", default=False)
    subset: str = option("configuration of a data set of the hub", default="")
    split: str = option("split of a data set (default: train, if there are several)", default="")
    limit: int | None = option("rows to read, from the first (default: all)", default=None, least=1)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range, or has no effect on a data set of the hub.
        """
        check_options(self)
        if self.streaming and self.kind:
            raise Gen2EmbedError(f"kind is {self.kind!r}, but with --streaming a data set is read; leave one out")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written, and where."""

    output_dir: str = option("folder for the vectors", needs="a folder")
    side: Side = option(
        "query: what one searches with; document: what is found", default="document", choices=("query", "document")
    )
    precision: str = option("type of the stored numbers", default="float32", choices=PRECISIONS)
    truncate_dim: int | None = option(
        "keep this many numbers of a vector, from the first, and bring it to length one again", default=None, least=1
    )
    file_format: str = option(
        "parquet; npy: arrays with ids in JSON lines", default="parquet", choices=FORMATS, flag="format"
    )
    rows_per_shard: int = option(
        "rows of the input per file; the unit that a killed run repeats", default=ROWS_PER_SHARD, least=1
    )
    keep_text: bool = option("write texts and paths of images beside the vectors", default=True)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(OutputOptions, InputOptions, EncodingConfig, EngineOptions):
    """What `encode` reads, how vectors are made, and what is written."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            Gen2EmbedError: A value is out of its range; the message names it and the remedy.
        """
        EncodingConfig.__post_init__(self)
        InputOptions.__post_init__(self)
        self.check_remote()
        self.check_engine()
