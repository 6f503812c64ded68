"""A space of MMEB-mini's rows: points by content, colors by class, and the files that are written."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.analysis.options import SpaceOptions
from gen2embed_mteb.analysis.space.atlas import file_of, parquet_bytes
from gen2embed_mteb.analysis.space.picture import colors_of, picture
from gen2embed_mteb.analysis.space.points import Points, kind_of
from gen2embed_mteb.analysis.space.run import analyze_space, as_json, open_rows, text_table
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.errors import Gen2EmbedError

ROWS = 8


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: Any) -> Path:
    """MMEB-mini with few rows."""
    from gen2embed_mteb.mini import benchmark

    root = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "NUM_QUERIES", ROWS)
        benchmark.ensure("eval", root)
    return root


def options_of(data_dir: Path, **more: Any) -> SpaceOptions:
    given: dict[str, Any] = {"subsets": ("Digits", "Scenes_i2t"), "prompts": ("none", "hierarchical")}
    given |= {"benchmark": "mmeb-mini", "data_dir": str(data_dir), "projection": "pca", "max_error_rate": 1.0}
    return SpaceOptions(**{**given, **more})


def points_of(positives: list[int], texts: list[str]) -> Points:
    return Points(
        queries=tuple(Item(str(number)) for number in range(len(positives))),
        candidates=tuple(map(Item, texts)),
        pairs=np.array(list(enumerate(positives))),
        query_vectors=np.zeros((len(positives), 2), np.float32),
        candidate_vectors=np.zeros((len(texts), 2), np.float32),
        errors=(),
    )


@pytest.fixture(scope="module")
def result(data_dir: Path, tmp_path_factory: Any) -> Any:
    """The space of the mini model, and the images of its data."""
    options = options_of(data_dir)
    data, rows = open_rows(options)
    model = Gen2Embed("gen2embed-mini", device="cpu")
    return analyze_space(model, options, tmp_path_factory.mktemp("vectors"), data, rows), data.images


def test_points_are_the_vectors_of_the_model_under_each_prompt(result: Any, data_dir: Path) -> None:
    space, images = result
    assert (space.datasets, space.prompts) == (("Digits", "Scenes_i2t"), ("none", "hierarchical"))
    for row in space.panels:
        for panel in row:
            model = Gen2Embed("gen2embed-mini", device="cpu", prompt_mode=panel.prompt)
            item = panel.points.queries[0]
            vector = model.encode_query([{"text": item.text, "image": images.open(item.images[0])}])[0]
            np.testing.assert_allclose(panel.points.query_vectors[0], vector, atol=1e-5)
            positive = panel.points.candidates[panel.points.classes[0]]
            found = panel.points.candidate_vectors[panel.points.classes[0]]
            np.testing.assert_allclose(found, model.encode_document([positive.text])[0], atol=1e-5)
            assert panel.places.shape == (len(panel.points.queries) + len(panel.points.candidates), 2)
    scenes = as_json(space)["datasets"]["Scenes_i2t"]
    assert (scenes["queries"], scenes["candidates"]) == ("image + text", "text")
    assert scenes["prompts"]["hierarchical"]["num_queries"] == ROWS
    assert "R@1" in text_table(space)


def test_the_picture_has_a_mark_for_each_point_and_says_which_projection_it_is(result: Any) -> None:
    drawn = picture(result[0]).svg()
    points = [panel.points for row in result[0].panels for panel in row]
    assert drawn.count("<circle") == sum(len(one.queries) + len(one.candidates) for one in points)
    assert drawn.count("<polyline") == sum(len(one.pairs) for one in points)
    assert "PCA of each panel by itself" in drawn and "UMAP" not in drawn


def test_the_parquet_file_holds_inputs_vectors_and_places(result: Any) -> None:
    space, images = result
    panel = space.panels[1][1]
    table = pyarrow.parquet.read_table(io.BytesIO(parquet_bytes(panel, images))).to_pydict()
    count = len(panel.points.queries)
    assert table["side"] == ["query"] * count + ["candidate"] * len(panel.points.candidates)
    np.testing.assert_allclose(table["vector"][:count], panel.points.query_vectors)
    np.testing.assert_allclose(np.array([table["projection_x"], table["projection_y"]]).T, panel.places)
    assert table["class"][0] == table["text"][count + table["pair"][0]]
    original = images.open(panel.points.queries[0].images[0])
    np.testing.assert_array_equal(Image.open(io.BytesIO(table["image"][0]["bytes"])), original)
    assert table["image"][count] is None
    assert file_of("A", "sys+q:rep-ow+d:off") == "space_A_sys+q-rep-ow+d-off.parquet"


def test_equal_pictures_under_two_names_are_one_point_and_bad_rows_are_set_aside(
    data_dir: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(data_dir, tmp_path / "data")
    images = copy / "images" / "Digits"
    (images / "00001.png").write_bytes((images / "00000.png").read_bytes())
    (images / "00002.png").write_bytes(b"no picture")
    options = options_of(copy, subsets=("Digits",), prompts=("none",))
    data, rows = open_rows(options)
    assert rows[0].pairs[1].query.images != rows[0].pairs[0].query.images
    space = analyze_space(Gen2Embed("gen2embed-mini", device="cpu"), options, tmp_path / "vectors", data, rows)
    points = space.panels[0][0].points
    assert len(points.queries) == ROWS - 2
    assert [(error.row, error.dataset) for error in space.errors] == [(2, "Digits")]
    assert space.error_rate == pytest.approx(1 / (1 + len(points.pairs)))


def test_queries_have_the_color_of_their_class_where_there_are_classes() -> None:
    colors, named = colors_of(points_of([0, 0, 0, 1, 1, 1, 1, 2, 0, 1], ["cat", "dog", "owl"]))
    assert [text for _, text in named] == ["dog", "cat"]  # the owl has one query alone
    assert colors[0] == colors[8] != colors[3] == colors[9]
    colors, named = colors_of(points_of([0, 1, 2], ["a", "b", "c"]))
    assert named == [] and len(set(colors)) == 1


def test_kinds_of_inputs() -> None:
    assert kind_of([Item("a")]) == "text"
    assert kind_of([Item("<|image_1|>\n", ("b",))]) == "image"
    assert kind_of([Item("a"), Item("a", ("b",))]) == "mixed"


def test_options_that_cannot_be_used_are_refused(data_dir: Path) -> None:
    with pytest.raises(Gen2EmbedError, match="freeret, whose texts differ by dataset"):
        options_of(data_dir, prompts=("none", "freeret"))
    with pytest.raises(Gen2EmbedError, match="unknown prompt_mode 'nothing'"):
        options_of(data_dir, prompts=("nothing",))
    with pytest.raises(Gen2EmbedError, match="--data_dir is needed"):
        open_rows(SpaceOptions(projection="none"))
    assert json.dumps(options_of(data_dir, subsets=()).names) == '["Digits", "Scenes_i2t"]'
