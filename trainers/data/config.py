"""The settings that say which training pairs are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gen2embed_mteb.data_files.rows import RowLimits
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.flags import check_options, option
from gen2embed_mteb.images.options import LinkOption, OrientationOption, RemoteOption

_NUMBERED = re.compile(r"negative_[1-9][0-9]{0,5}")
PAIR_COLUMNS = (("anchor", "positive"), ("query", "positive"))
"""Names of columns that are taken for a query's and its positive's, if none are named."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowLimits, LinkOption, RemoteOption, OrientationOption):
    """Says which training pairs are read, and where their images are."""

    data_dir: str = option(
        "training pairs: folder, file or hub id, mmeb-mini, or docstrings",
        needs="a folder, a file, a Hub id, mmeb-mini, or docstrings",
    )
    split: str = option("default: original in MMEB-train's form, train elsewhere", default="")
    subsets: tuple[str, ...] = option("subsets to read (default: all)", default=())
    image_dir: str = option(
        "folder or .zip archive that image paths are relative to; default: beside the data", default=""
    )
    columns: tuple[str, ...] = option(
        "the query's column and its positive's, in data of two columns (default: anchor or query, and positive)",
        default=(),
    )
    image_columns: tuple[str, ...] = option("which of the two columns hold paths of images", default=())
    limit: int | None = option("rows per subset, from the first (default: all)", default=None, least=1)
    pairs_only: bool = option(
        "in data of two columns: no lists of positives, and no explicit negatives (columns negative, negative_1, …), "
        "as before version 0.1",
        default=False,
    )

    known_columns: ClassVar[str] = "anchor (or query) and positive"
    name_columns: ClassVar[str] = "Name two of them with --columns"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: A value is out of its range; the message names it and the remedy.
        """
        check_options(self)
        self.check_remote()
        if len(self.columns) not in (0, 2) or len(set(self.columns)) != len(self.columns):
            raise Gen2EmbedError(f"columns is {self.columns}; pass two names, the query's and its positive's")

    def two_columns(self, present: Sequence[str]) -> tuple[str, str] | None:
        """Return the query's column and its positive's, of the columns that a table has; None if they are not there."""
        wanted = ((self.columns[0], self.columns[1]),) if self.columns else PAIR_COLUMNS
        return next((pair for pair in wanted if set(pair) <= set(present)), None)

    def negative_columns(self, present: Sequence[str]) -> tuple[str, ...]:
        """Return the columns of explicit negatives among those that a table has: `negative`, then by their number."""
        numbered = {name: int(name.removeprefix("negative_")) for name in present if _NUMBERED.fullmatch(name)}
        found = [*(["negative"] if "negative" in present else []), *sorted(numbered, key=numbered.__getitem__)]
        return () if self.pairs_only else tuple(name for name in found if name not in self.columns)

    @classmethod
    def of_records(
        cls,
        records: Sequence[Mapping[str, Any]],
        data_dir: str = "",
        image_dir: str = "",
        *,
        follow_links: bool = False,
        exif_orientation: bool = False,
        remote_images: Sequence[str] = (),
    ) -> DataConfig:
        """Return the settings for the data that a sampling run read.

        Args:
            records: One record per subset, of one run.
            data_dir: The data, if it is not where the records say.
            image_dir: Its images, if they are not where the records say.
            follow_links: Whether links in the image folder may lead out of it.
            exif_orientation: Whether images are turned as their EXIF data says.
            remote_images: Which images may be read from other machines.
        """
        data = records[0]["data"]
        return cls(
            data_dir=data_dir or data["data_dir"],
            # If the data was moved, its images are looked for beside its new place.
            image_dir=image_dir or ("" if data_dir else data["image_dir"]),
            follow_links=follow_links,
            exif_orientation=exif_orientation,
            remote_images=tuple(remote_images),
            split=data["split"],
            subsets=tuple(record["subset"] for record in records),
            columns=tuple(data["columns"]),
            image_columns=tuple(data["image_columns"]),
            limit=data["limit"],
            pairs_only=data.get("pairs_only", True),  # earlier versions read nothing else
            **(data.get("row_limits") or {}),
        )
