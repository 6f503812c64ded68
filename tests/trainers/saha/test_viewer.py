"""The page of clusters: what it shows, that it is self-contained, and that data cannot break out of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mmeb_files import COLOURS, M, write_images, write_table
from plain_encoder import PlainEncoder

from trainers.data import open_training_data
from trainers.saha.files import SamplingError, read_sampling
from trainers.saha.sample import ModelRecord, SampleConfig, sample
from trainers.saha.viewer import inspect

NAMES = list(COLOURS)


def rows() -> list[dict[str, str]]:
    made = []
    for word in ("cat", "dog", "<script>alert(1)</script>"):
        for name in NAMES:
            made.append(
                {
                    "qry": f"{M}\nWhich {word}?\n",
                    "qry_image_path": f"images/{name}.png",
                    "pos_text": f"{name} & {word}",
                    "pos_image_path": "",
                }
            )
    return made


def sampled(root: Path, **changes: Any) -> Path:
    write_images(root / "data" / "images", (500, 300))
    write_table(root / "data" / "VOC2007" / "original-00000-of-00001.parquet", rows())
    settings: dict[str, Any] = {
        "data_dir": str(root / "data"),
        "output_dir": str(root / "out"),
        "subsets": ("VOC2007",),
    }
    config = SampleConfig(**{**settings, "num_hard_negatives": 3, "pool_multiplier": 2, **changes})
    data = open_training_data(config, config.images_cache)
    sample(PlainEncoder(), ModelRecord("plain", "", "none", "plain-1"), data, config)
    return root / "out"


def test_the_page_shows_every_pair_of_a_cluster(tmp_path: Path) -> None:
    out = sampled(tmp_path)
    page = inspect(out / "VOC2007.parquet", num_clusters=100)
    assert page == out / "VOC2007.html"
    text = page.read_text(encoding="utf-8")
    clusters = read_sampling(out / "VOC2007.json").clusters
    assert text.count("class='cluster'") == len(clusters.anchors)
    pairs = len(clusters.anchors) + int((clusters.members >= 0).sum())
    assert text.count("<img") == pairs  # one image a pair: the query's
    assert text.count(">its positive<") == pairs
    assert re.findall(r"</i>([\d.-]+)</div>", text) == [
        f"{value:.3f}" for value in clusters.similarities[clusters.members >= 0]
    ]
    for anchor, phase in zip(clusters.anchors, clusters.phase, strict=True):
        assert f"phase {phase} · anchor is row {anchor}<" in text


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    text = inspect(sampled(tmp_path) / "VOC2007.parquet", num_clusters=100).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "red &amp; cat" in text
    assert M not in text
    assert not re.search(r"(src|href)='(?!data:)", text)
    assert "http" not in text
    assert len(text) < 2_000_000  # pictures of 500 x 300 were made smaller


def test_clusters_at_even_distances(tmp_path: Path) -> None:
    out = sampled(tmp_path, method="hn")
    page = inspect(out / "VOC2007.json", tmp_path / "page.html", num_clusters=3)
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"Cluster (\d+)", text) == ["1", "8", "15"]
    assert "hard negative" in text
    assert text.count("<img") == 3  # the anchors' queries; of members only the positive is shown
    with pytest.raises(ValueError, match="num_clusters is 0"):
        inspect(out / "VOC2007.json", num_clusters=0)


def test_other_data_is_refused_and_moved_data_is_found(tmp_path: Path) -> None:
    out = sampled(tmp_path)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no such folder"):
        inspect(out / "VOC2007.parquet")
    inspect(out / "VOC2007.parquet", data_dir=str(tmp_path / "moved"))
    write_table(tmp_path / "moved" / "VOC2007" / "original-00000-of-00001.parquet", rows()[1:])
    with pytest.raises(SamplingError, match="made with other rows"):
        inspect(out / "VOC2007.parquet", data_dir=str(tmp_path / "moved"))


def test_an_image_that_is_gone_is_said(tmp_path: Path) -> None:
    out = sampled(tmp_path)
    (tmp_path / "data" / "images" / "red.png").unlink()
    text = inspect(out / "VOC2007.parquet", num_clusters=100).read_text(encoding="utf-8")
    assert "class='fault'>image &#x27;images/red.png&#x27;: not found" in text


def test_the_official_form_can_be_inspected(tmp_path: Path) -> None:
    out = sampled(tmp_path, file_format="official")
    file = out / "VOC2007_hard_negatives.json"
    with pytest.raises(SamplingError, match="--data_dir"):
        inspect(file)
    text = inspect(file, data_dir=str(tmp_path / "data"), num_clusters=100).read_text(encoding="utf-8")
    assert text.count("class='cluster'") == len(json.loads(file.read_text()))
    assert "class='similarity'" not in text  # the form has none
