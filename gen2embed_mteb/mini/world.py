"""The mini world: scenes of coloured shapes, and drawing them as 64 x 64 images.

A scene is a value (attributes by name); `draw` turns it into pixels. All images that the mini model learns from, and
all that MMEB-mini measures, are drawn here. Training and evaluation use different random streams, so they share the
kind of scenes but never an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gen2embed_mteb.errors import Gen2EmbedError

SIDE = 64
"""Width and height of an image, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 30),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (150, 150, 150),
    "pink": (250, 180, 200),
    "cyan": (140, 225, 230),
    "brown": (115, 80, 50),
}
PLACES: dict[str, tuple[int, int]] = {
    "left": (17, 32),
    "right": (47, 32),
    "top": (32, 17),
    "bottom": (32, 47),
    "middle": (32, 32),
}
SIZES: dict[str, tuple[float, float]] = {"small": (7.5, 9.5), "large": (13.0, 16.0)}
"""The range of the radius in pixels, by size."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ARRANGEMENTS = {"horizontal": ("left", "right"), "vertical": ("top", "bottom")}


@dataclass(frozen=True)
class Thing:
    """One object of a scene. Each field is the English word of an attribute."""

    shape: str
    color: str
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """One thing, or two of different shape and colour side by side (left/right) or stacked (top/bottom)."""

    things: tuple[Thing, ...]
    background: str

    @property
    def attributes(self) -> tuple[str, ...]:
        """Every attribute word of the scene, without repeats, things in order, the background last."""
        words = [word for thing in self.things for word in (thing.shape, thing.color, thing.place, thing.size)]
        return tuple(dict.fromkeys([*words, self.background]))


def random_scene(rng: np.random.Generator, num_things: int = 1) -> Scene:
    """Return a scene with uniform and independent attributes; two things have distinct shapes and distinct colours."""
    shapes = rng.choice(len(SHAPES), size=num_things, replace=False)
    colors = rng.choice(len(COLORS), size=num_things, replace=False)
    if num_things == 1:
        places: tuple[str, ...] = (list(PLACES)[rng.integers(len(PLACES))],)
    else:
        places = ARRANGEMENTS["horizontal" if rng.integers(2) else "vertical"]
    things = tuple(
        Thing(SHAPES[shape], list(COLORS)[color], place, list(SIZES)[rng.integers(len(SIZES))])
        for shape, color, place in zip(shapes, colors, places, strict=True)
    )
    return Scene(things, list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])


def draw(scene: Scene, rng: np.random.Generator, noise: float = 6.0) -> np.ndarray:
    """Draw a scene with jittered position, radius, tilt and colour.

    Args:
        scene: The scene.
        rng: The source of the jitter; the same state gives the same pixels.
        noise: The standard deviation of the pixel noise, in grey levels of 0-255.

    Returns:
        (SIDE, SIDE, 3) uint8.
    """
    shade = rng.uniform(-12, 12, size=3)
    image = np.empty((SIDE, SIDE, 3))
    image[:] = np.asarray(BACKGROUNDS[scene.background]) + shade
    for thing in scene.things:
        _draw_thing(image, thing, rng, crowded=len(scene.things) > 1)
    image += rng.normal(0.0, noise, size=image.shape)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def crop_of(image: np.ndarray, thing: Thing) -> np.ndarray:
    """Return the part of a two-thing image that holds `thing`: a 32 x 32 window, enlarged twice to (SIDE, SIDE, 3)."""
    x, y = PLACES[thing.place]
    left, top = (min(max(c - SIDE // 4, 0), SIDE // 2) for c in (x, y))
    window = image[top : top + SIDE // 2, left : left + SIDE // 2]
    return window.repeat(2, axis=0).repeat(2, axis=1)


def digit_image(pixels: np.ndarray) -> np.ndarray:
    """Return a handwritten digit of scikit-learn, (8, 8) of 0-16, as a (SIDE, SIDE, 3) uint8 image, bright on dark."""
    levels = np.rint(np.asarray(pixels, dtype=np.float64) * (255.0 / 16.0)).astype(np.uint8)
    grey = levels.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)
    return np.stack([grey] * 3, axis=-1)


def _draw_thing(image: np.ndarray, thing: Thing, rng: np.random.Generator, crowded: bool) -> None:
    low, high = SIZES[thing.size]
    radius = rng.uniform(low, high) * (0.85 if crowded else 1.0)
    x, y = np.asarray(PLACES[thing.place]) + rng.uniform(-2.5, 2.5, size=2)
    tilt = rng.uniform(-0.14, 0.14)
    color = np.asarray(COLORS[thing.color]) + rng.uniform(-14, 14, size=3)

    # For anti-aliasing, draw at twice the resolution inside the bounding box and average.
    reach = radius * 1.25 + 1
    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 1, SIDE)
    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 1, SIDE)
    columns = (np.arange(2 * x0, 2 * x1) + 0.5) / 2 - x
    rows = (np.arange(2 * y0, 2 * y1) + 0.5) / 2 - y
    cos, sin = np.cos(tilt), np.sin(tilt)
    u = (columns[None, :] * cos + rows[:, None] * sin) / radius
    v = (rows[:, None] * cos - columns[None, :] * sin) / radius
    inside = _inside(thing.shape, u, v).astype(np.float64)
    cover = inside.reshape(y1 - y0, 2, x1 - x0, 2).mean(axis=(1, 3))[:, :, None]
    image[y0:y1, x0:x1] = image[y0:y1, x0:x1] * (1 - cover) + color * cover


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return whether the points (u to the right, v down, in radii from the centre) are inside the shape."""
    au, av, radius = np.abs(u), np.abs(v), np.hypot(u, v)
    match shape:
        case "circle":
            return radius < 0.95
        case "square":
            return np.maximum(au, av) < 0.85
        case "triangle":
            return (v < 0.75) & (1.75 * au - v < 0.95)
        case "diamond":
            return 1.25 * au + av < 1.1
        case "ring":
            return (radius < 1.0) & (radius > 0.55)
        case "cross":
            return (np.maximum(au, av) < 1.0) & (np.minimum(au, av) < 0.32)
        case "star":
            return radius < 0.68 + 0.36 * np.cos(5 * (np.arctan2(v, u) + np.pi / 2))
        case "heart":
            p, q = 1.2 * u, 0.2 - 1.2 * v
            return (p * p + q * q - 1) ** 3 - p * p * q**3 < 0
    raise Gen2EmbedError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
