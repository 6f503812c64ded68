"""The mini world: scenes, drawing, crops, digits."""

import numpy as np
import pytest

from gen2embed_mteb.mini import world
from gen2embed_mteb.mini.world import Scene, Thing


def scene_of(shape="circle", color="red", place="middle", size="large", background="gray"):
    return Scene((Thing(shape, color, place, size),), background)


def test_the_same_stream_draws_the_same_pixels_and_another_does_not():
    first, again, other = (world.draw(scene_of(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8


@pytest.mark.parametrize("color", world.COLORS)
def test_a_things_colour_stands_where_it_is_placed(color):
    for place, (x, y) in world.PLACES.items():
        image = world.draw(scene_of(color=color, place=place), np.random.default_rng(0), noise=0.0)
        assert np.abs(image[y, x].astype(int) - world.COLORS[color]).max() <= 15, place
        corner = image[0, 0].astype(int) - world.BACKGROUNDS["gray"]
        assert np.abs(corner).max() <= 13


def test_every_shape_covers_another_area():
    covered = {}
    for shape in world.SHAPES:
        white = world.draw(scene_of(shape, "white", background="brown"), np.random.default_rng(3), noise=0.0)
        covered[shape] = (white.min(axis=2) > 200).sum()
    assert len(set(covered.values())) == len(world.SHAPES)
    assert covered["ring"] < covered["circle"]
    assert all(count > 60 for count in covered.values())


def test_a_ring_is_hollow_and_a_circle_is_not():
    for shape, hollow in (("ring", True), ("circle", False)):
        image = world.draw(scene_of(shape, "white", background="brown"), np.random.default_rng(0), noise=0.0)
        assert (image[32, 32].min() < 200) == hollow


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match="hexagon"):
        world.draw(scene_of("hexagon"), np.random.default_rng(0))


def test_two_things_differ_in_shape_and_colour_and_face_each_other():
    rng = np.random.default_rng(0)
    arrangements = set()
    for _ in range(100):
        first, second = world.random_scene(rng, 2).things
        assert first.shape != second.shape
        assert first.color != second.color
        arrangements.add((first.place, second.place))
    assert arrangements == {("left", "right"), ("top", "bottom")}


def test_attributes_have_no_repeats_and_end_with_the_background():
    assert scene_of().attributes == ("circle", "red", "middle", "large", "gray")


def test_a_crop_holds_its_thing_and_not_the_other():
    scene = Scene((Thing("circle", "red", "left", "small"), Thing("square", "blue", "right", "small")), "gray")
    image = world.draw(scene, np.random.default_rng(0), noise=0.0).astype(int)
    for thing, other in (scene.things, scene.things[::-1]):
        crop = world.crop_of(image, thing)
        assert crop.shape == (64, 64, 3)
        near = np.abs(crop - world.COLORS[thing.color]).max(axis=2) <= 20
        assert near.sum() > 200
        assert not (np.abs(crop - world.COLORS[other.color]).max(axis=2) <= 20).any()


def test_a_digit_keeps_its_strokes():
    scan = np.zeros((8, 8))
    scan[2, 5] = 16
    image = world.digit_image(scan)
    assert image.shape == (64, 64, 3)
    assert (image[16:24, 40:48] == 255).all()
    assert image.sum() == 255 * 8 * 8 * 3
