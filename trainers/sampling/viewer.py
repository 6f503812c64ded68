"""Writes a page on which a person can judge clusters (paper, Fig. 3): anchor, positive, members, similarities."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation import pages
from gen2embed_mteb.evaluation.tables import Table
from gen2embed_mteb.flags import option
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.options import LinkOption, RemoteOption
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb.readers import TrainRow
from gen2embed_mteb.storage.owned_folder import OwnedFolder
from trainers.data.config import DataConfig
from trainers.data.training_data import MmebSubset, TrainingData, open_training_data
from trainers.sampling.files import (
    OFFICIAL_SUFFIX,
    RowsDigest,
    SampledClusters,
    SamplingError,
    read_official,
    read_sampling,
)

PICTURE_SIDE = 224
"""The longer side of a picture on the page, in pixels: 20 clusters of 16 pairs stay under ten megabytes."""

_STYLE = """
.cluster { border-top: 1px solid var(--line); padding: 1rem 0 1.4rem; display: grid; gap: .8rem 1rem;
  grid-template-columns: 13rem minmax(0, 1fr); }
.cluster h2 { grid-column: 1 / -1; margin: 0; font-size: 1rem; } .cluster h2 span { font-weight: normal; opacity: .7; }
.members { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); }
.pair { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .6rem; font-size: .8rem; line-height: 1.35;
  display: flex; flex-direction: column; gap: .45rem; }
.anchor { border: 2px solid var(--ours); align-self: start; }
.side { display: grid; gap: .25rem; } .side + .side { border-top: 1px dashed var(--line); padding-top: .45rem; }
.name { font-size: .68rem; letter-spacing: .05em; text-transform: uppercase; opacity: .65; }
.side img { max-height: 9rem; justify-self: start; } .tiny { width: 6rem; image-rendering: pixelated; }
.fault { color: #c0392b; }
.similarity { margin-top: auto; display: flex; gap: .5rem; align-items: center; font-variant-numeric: tabular-nums; }
.similarity i { flex: 1; height: .35rem; border-radius: 2px; background: var(--faint); }
.similarity b { display: block; height: 100%; border-radius: 2px; background: var(--ours); }
@media (max-width: 40rem) { .cluster { grid-template-columns: minmax(0, 1fr); } }
"""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LinkOption, RemoteOption):
    """The settings of a page of clusters."""

    file: str = option("SUBSET.parquet or .json that `sample` wrote, or SUBSET_hard_negatives.json", positional=True)
    output: str | None = option("the page; default: SUBSET.html beside the file", default=None)
    data_dir: str = option("the training pairs, if they are not where the file says", default="")
    image_dir: str = option("their images, if they are not where the file says", default="")
    num_clusters: int = option("clusters to show at most, at even distances", default=20, least=1)


def inspect(
    file: str | Path,
    output: str | Path | None = None,
    *,
    data_dir: str = "",
    image_dir: str = "",
    follow_links: bool = False,
    remote_images: Sequence[str] = (),
    num_clusters: int = 20,
) -> Path:
    """Write a page of a subset's clusters, taken at even distances from the first to the last.

    Args:
        file: `<subset>.parquet` or `<subset>.json`, or the official code's `<subset>_hard_negatives.json`.
        output: The page, a name that ends in `.html`; None: `<subset>.html` beside the file.
        data_dir: The training data, if it is not where the record says, or if there is no record.
        image_dir: Its images, in the same cases.
        follow_links: Whether links in the image folder may lead out of it.
        remote_images: Which images may be read from other machines.
        num_clusters: How many clusters to show at most.

    Returns:
        The page's path.

    Raises:
        SamplingError: The file cannot be used, or was made with other data.
        DataError: The training data is not found.
        ForeignFileError: The page would replace a file that `inspect` did not write, or that was changed since.
        ValueError: `num_clusters` is below 1, or `output` does not end in `.html`.
    """
    if num_clusters < 1:
        raise Gen2EmbedError(f"num_clusters is {num_clusters}; pass 1 or more")
    path = Path(file).expanduser()
    official = path.name.endswith(OFFICIAL_SUFFIX)
    sampling = None if official else read_sampling(path)
    record = _stand_in(path, data_dir) if sampling is None else sampling.record
    page = Path(output).expanduser() if output is not None else path.with_name(f"{record['subset']}.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise Gen2EmbedError(f"output is {page}; pass a file that ends in .html, since it is a page")
    folder = OwnedFolder(page.parent, "inspect")
    folder.check([page.name], [path])
    config = DataConfig.of_records(
        [record],
        data_dir,
        image_dir,
        follow_links=follow_links,
        exif_orientation=bool(record.get("settings", {}).get("exif_orientation")),
        remote_images=remote_images,
    )
    data = open_training_data(config, path.parent / "images-cache")
    if sampling is None:
        method, clusters = _read_official(path, data)
    else:
        method, clusters = record["method"], sampling.clusters
    chosen = np.unique(np.linspace(0, len(clusters.anchors) - 1, min(num_clusters, len(clusters.anchors))).astype(int))
    wanted = set(clusters.anchors[chosen].tolist()) | set(clusters.members[chosen].ravel().tolist())
    rows: dict[int, TrainRow] = {}
    digest = RowsDigest()
    for row in data.subsets[0].rows():
        digest.add(row)
        if row.index in wanted and isinstance(row, TrainRow):
            rows[row.index] = row
    if sampling is not None:
        sampling.require_data(digest.hexdigest())
    parts = [
        f"<h1>{html.escape(record['subset'])}: clusters of <code>{html.escape(method)}</code></h1>",
        pages.table(_facts(record, clusters), "left"),
        f"<p>{len(chosen)} of {len(clusters.anchors):,} clusters, at even distances. {html.escape(_guide(method))}</p>",
        *(_cluster(number, clusters, rows, data.images, method) for number in chosen.tolist()),
    ]
    return folder.write(page.name, pages.page_bytes(f"{record['subset']}: clusters", _STYLE, parts))


def _stand_in(path: Path, data_dir: str) -> dict[str, Any]:
    """Return what is used in place of the record for an official file, which has none."""
    if not data_dir:
        raise SamplingError(f"{path}: the official form does not say what it was made of; pass --data_dir")
    data = {"data_dir": data_dir, "image_dir": "", "split": "", "columns": (), "image_columns": (), "limit": None}
    return {"subset": path.name.removesuffix(OFFICIAL_SUFFIX), "data": data}


def _read_official(path: Path, data: TrainingData) -> tuple[str, SampledClusters]:
    subset = data.subsets[0]
    if not isinstance(subset, MmebSubset):
        raise SamplingError(f"{path}: made of MMEB-train's form, but {subset.source} is not in it")
    return read_official(path, subset.columns())


def _facts(record: Mapping[str, Any], clusters: SampledClusters) -> Table:
    facts = [["setting", "value"]]
    if "model" in record:
        model, settings, counts = record["model"], record["settings"], record["counts"]
        shown = {name: value for name, value in settings.items() if value not in (None, False)}
        facts.append(["model", " ".join(filter(None, (model["name"], model["revision"], model["prompt_mode"])))])
        facts.append(["data", f"{record['data']['source']}, split {record['data']['split']}"])
        facts.append(["settings", ", ".join(f"{name} {value}" for name, value in shown.items())])
        facts.append(["counts", ", ".join(f"{name} {value:,}" for name, value in counts.items())])
    else:
        facts.append(["data", record["data"]["data_dir"]])
        facts.append(["clusters", f"{len(clusters.anchors):,}, up to {clusters.members.shape[1]} members"])
    return facts


def _guide(method: str) -> str:
    if method == "saha":
        return (
            "A good member resembles the anchor (it is hard), and its positive does not answer the anchor's query (it "
            "is a true negative). The figure is the similarity of the two queries."
        )
    if method == "in-batch":
        return "Every row is alone: its negatives are what else is in the batch."
    return "A good hard negative does not answer the anchor's query. The figure is its similarity to that query."


def _cluster(
    number: int, clusters: SampledClusters, rows: Mapping[int, TrainRow], images: ImageSource, method: str
) -> str:
    anchor = int(clusters.anchors[number])
    of_members = clusters.members[number].tolist()
    places = [0] * len(of_members) if clusters.places is None else clusters.places[number].tolist()
    members = [
        _member(rows[member], place, similarity, images, method)
        for member, place, similarity in zip(of_members, places, clusters.similarities[number].tolist(), strict=True)
        if member >= 0
    ]
    row = rows[anchor]
    shown = [("anchor", row.query), *(("its positive", item) for item in row.positives)]
    shown += [("its explicit negative", item) for item in row.negatives]
    pair = "".join(_side(name, item, images) for name, item in shown)
    return (
        f"<section class='cluster'><h2>Cluster {number + 1:,} "
        f"<span>· phase {clusters.phase[number]} · anchor is row {anchor:,}</span></h2>"
        f"<div class='pair anchor'>{pair}</div>"
        f"<div class='members'>{''.join(members)}</div></section>"
    )


def _member(row: TrainRow, place: int, similarity: float, images: ImageSource, method: str) -> str:
    if method == "saha":
        shown = _side(f"query, row {row.index:,}", row.query, images)
        shown += "".join(_side("its positive", item, images) for item in row.positives)
    else:
        shown = _side("hard negative", row.positives[place], images)
    bar = ""
    if not math.isnan(similarity):
        width = 100 * min(1.0, max(0.0, similarity))
        bar = f"<div class='similarity'><i><b style='width:{width:.0f}%'></b></i>{similarity:.3f}</div>"
    return f"<div class='pair'>{shown}{bar}</div>"


def _side(side: str, item: Item, images: ImageSource) -> str:
    shown = []
    for path in item.images:
        try:
            shown.append(pages.picture(images.open(path), path, PICTURE_SIDE))
        except ImageError as error:
            shown.append(f"<div class='fault'>{html.escape(str(error))}</div>")
    text = pages.plain(item.text)
    if text:
        shown.append(f"<div>{text}</div>")
    return f"<div class='side'><div class='name'>{side}</div>{''.join(shown)}</div>"
