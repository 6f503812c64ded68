"""A drawing says the same in both of its forms."""

import io
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from gen2embed_mteb.analysis.drawing.canvas import Canvas, shortened, text_width
from gen2embed_mteb.analysis.drawing.charts import Box, Series, line_chart
from gen2embed_mteb.analysis.drawing.colors import scaled

SVG = "{http://www.w3.org/2000/svg}"


def pixels(canvas: Canvas) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(canvas.png_bytes())))


def texts(canvas: Canvas) -> list[str]:
    return ["".join(one.itertext()) for one in ElementTree.fromstring(canvas.svg_bytes()).iter(f"{SVG}text")]


def test_shapes_stand_at_the_same_places_in_both_forms() -> None:
    canvas = Canvas(60, 40)
    canvas.rectangle(10, 5, 20, 10, "#0000ff")
    canvas.circle(45, 20, 8, "#ff0000")
    canvas.line([(0, 35), (60, 35)], "#00ff00", width=2)
    canvas.image(2, 22, 8, 8, Image.new("RGB", (2, 2), "#123456"), pixelated=True)
    found = pixels(canvas)
    assert found.shape == (80, 120, 3)
    assert found[20, 40].tolist() == [0, 0, 255]
    assert found[5, 5].tolist() == found[32, 62].tolist() == [255, 255, 255]
    assert found[40, 90].tolist() == [255, 0, 0]
    assert found[70, 60].tolist() == [0, 255, 0]
    assert found[52, 12].tolist() == [0x12, 0x34, 0x56]
    names = [one.tag.removeprefix(SVG) for one in ElementTree.fromstring(canvas.svg())]
    assert names == ["rect", "rect", "circle", "polyline", "image"]


def test_colors_that_can_be_seen_through_are_mixed() -> None:
    canvas = Canvas(10, 10)
    canvas.rectangle(0, 0, 10, 10, "#000000", opacity=0.5)
    assert pixels(canvas)[10, 10] == pytest.approx([127, 127, 127], abs=1)


def test_any_text_makes_valid_xml() -> None:
    canvas = Canvas(100, 20, title="<&>")
    canvas.text(0, 10, 'a<b> & "c" \x00\x1b\n\ud800 图 é')
    assert texts(canvas) == ['a<b> & "c" \\x00\\x1b\\n\\ud800 图 é']
    assert (pixels(canvas) < 255).any()


def test_upward_text_stands_above_its_point() -> None:
    canvas = Canvas(60, 60)
    canvas.text(30, 50, "IIIIII", upward=True)
    rows, columns = np.nonzero((pixels(canvas) < 200).any(axis=2))
    assert rows.max() <= 101 and rows.min() < 70
    assert columns.min() >= 36 and columns.max() <= 62


def test_a_shortened_text_fits() -> None:
    assert shortened("a  b\nc", 100) == "a b c"
    found = shortened("word " * 50, 120, 12)
    assert found.endswith("…") and text_width(found, 12) <= 120


def test_the_scale_of_colors_runs_from_dark_to_light() -> None:
    found = scaled(np.array([0.0, 0.5, 1.0, 2.0, math.nan]))
    assert found[0].tolist() == [68, 1, 84, 255]
    assert found[2].tolist() == found[3].tolist() == [253, 231, 37, 255]
    assert found[4, 3] == 0
    assert found[0, :3].sum() < found[1, :3].sum() < found[2, :3].sum()


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_puts_higher_values_higher(log: bool) -> None:
    canvas = Canvas(300, 200)
    series = Series(((0, 1.0), (1, 10.0), (2, 100.0)), "#ff0000")
    line_chart(canvas, Box(50, 40, 200, 120), [series], "rising", log=log)
    circles = list(ElementTree.fromstring(canvas.svg()).iter(f"{SVG}circle"))
    heights = [float(one.get("cy")) for one in circles]
    assert heights[0] > heights[1] > heights[2] >= 40
    # On a logarithmic scale equal factors are equal distances.
    assert (heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)) == log
    assert "rising" in texts(canvas)


def test_a_chart_of_one_layer_and_of_none() -> None:
    canvas = Canvas(300, 200)
    line_chart(canvas, Box(50, 40, 200, 120), [Series(((3, 0.0),), "#ff0000")], "one")
    line_chart(canvas, Box(50, 40, 200, 120), [Series((), "#ff0000")], "none", log=True)
    assert {"one", "none", "3"} <= set(texts(canvas))
