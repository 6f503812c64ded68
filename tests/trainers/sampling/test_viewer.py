"""The page of clusters: what it shows, that it is self-contained, and that data cannot break out of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from mmeb_files import COLOURS, M, write_images, write_table
from plain_encoder import PlainEncoder

from gen2embed_mteb.cli import main
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.storage.atomic import ForeignFileError
from trainers.data.training_data import open_training_data
from trainers.sampling.files import SamplingError, read_sampling
from trainers.sampling.sample import ModelRecord, SampleConfig, sample
from trainers.sampling.viewer import inspect

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


def test_the_page_replaces_no_file_but_an_earlier_page(tmp_path: Path) -> None:
    out = sampled(tmp_path)
    page = inspect(out / "VOC2007.parquet")
    assert inspect(out / "VOC2007.json", num_clusters=1) == page
    table = tmp_path / "data" / "VOC2007" / "original-00000-of-00001.parquet"
    before = {path: path.read_bytes() for path in (*out.glob("*.*"), table)}
    for output in (
        out / "VOC2007.parquet",
        out / "VOC2007.json",
        out / "Other.parquet",
        out / "errors.jsonl",
        tmp_path / "data" / "images" / "red.png",
        table,
        tmp_path / "page",
    ):
        with pytest.raises(Gen2EmbedError, match=r"ends in \.html"):
            inspect(out / "VOC2007.parquet", output)
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "page").exists()


def test_a_page_of_others_stays(tmp_path: Path) -> None:
    out = sampled(tmp_path)
    for name, make in (
        ("notes.html", lambda path: path.write_text("mine")),
        ("folder.html", lambda path: path.mkdir()),
        ("link.html", lambda path: path.symlink_to("VOC2007.parquet")),
    ):
        make(out / name)
        with pytest.raises(ForeignFileError, match=name):
            inspect(out / "VOC2007.parquet", out / name)
    assert (out / "notes.html").read_text() == "mine"
    page = inspect(out / "VOC2007.parquet")
    page.write_text(page.read_text() + "<!-- my notes -->")
    with pytest.raises(ForeignFileError, match="was changed since"):
        inspect(out / "VOC2007.parquet")
    assert page.read_text().endswith("<!-- my notes -->")


def test_a_damaged_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sampled(tmp_path)
    record = json.loads((out / "VOC2007.json").read_text())
    for section, field, value in (
        ("settings", "num_hard_negatives", None),
        ("settings", "num_hard_negatives", "3"),
        ("settings", "num_hard_negatives", 10**12),
        ("data", "data_dir", 5),
        ("model", "name", ["m"]),
        ("counts", "rows", "many"),
    ):
        damaged = {**record, section: {**record[section], field: value}}
        (out / "VOC2007.json").write_text(json.dumps(damaged))
        assert main(["inspect", str(out / "VOC2007.parquet")]) == 2
        said = capsys.readouterr().err
        assert f"{section}.{field} is" in said
        assert len(said.splitlines()) == 1
    (out / "VOC2007.json").write_text(json.dumps({**record, "subset": ["VOC2007"]}))
    assert main(["inspect", str(out / "VOC2007.json")]) == 2
    assert 'subset is ["VOC2007"], must be the name of a subset' in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["{", "1", '["a"]', "[null]", "[[]]", '[{"qry": []}]', "[" * 100_000], ids=lambda text: text[:30]
)
def test_a_damaged_official_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = sampled(tmp_path, file_format="official") / "VOC2007_hard_negatives.json"
    file.write_text(content)
    with pytest.raises(SamplingError, match=r"VOC2007_hard_negatives\.json") as caught:
        inspect(file, data_dir=str(tmp_path / "data"))
    assert len(str(caught.value).splitlines()) == 1
