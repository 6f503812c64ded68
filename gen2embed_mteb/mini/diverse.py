"""Diverse-mini: images of the mini world with captions, in the layouts of Flickr30K and Urban1K.

Every image has another scene of two things, so that a caption belongs to one image alone. In Flickr30K's layout it has
five captions in other words; in Urban1K's a long one that tells all there is.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from gen2embed_mteb.mini import language
from gen2embed_mteb.mini.places import DIVERSE
from gen2embed_mteb.mini.world import Scene, Thing, draw, random_scene
from gen2embed_mteb.storage.atomic import write_atomic

NUM_IMAGES = 200
"""Images of each of the two datasets."""
_RELATIONS = {"left": ("to the left of", "to the right of"), "top": ("above", "below")}


def write_diverse(root: Path, rng: np.random.Generator) -> None:
    """Write `diverse/flickr30k_test/*.parquet` and `diverse/Urban1k/` under `root`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scenes = _scenes(rng, 2 * NUM_IMAGES)
    flickr, urban = root / DIVERSE / "flickr30k_test", root / DIVERSE / "Urban1k"
    for folder in (flickr, urban / "caption", urban / "image"):
        folder.mkdir(parents=True)
    rows = []
    for number, scene in enumerate(scenes[:NUM_IMAGES]):
        packed = io.BytesIO()
        Image.fromarray(draw(scene, rng)).save(packed, "PNG", compress_level=1)
        rows.append({"image": {"bytes": packed.getvalue(), "path": f"{number}.png"}, "text": captions(scene)})
    pq.write_table(pa.Table.from_pylist(rows), flickr / "test-00000-of-00001.parquet")
    for number, scene in enumerate(scenes[NUM_IMAGES:], 1):
        Image.fromarray(draw(scene, rng)).save(urban / "image" / f"{number}.png", compress_level=1)
        write_atomic(urban / "caption" / f"{number}.txt", f"{long_caption(scene)}\n".encode())


def captions(scene: Scene) -> list[str]:
    """Return five captions of a scene of two things; all tell colours, shapes and places."""
    one, other = scene.things
    there, back = _RELATIONS[one.place]
    first, second = language.named(one), language.named(other)
    return [
        f"{_a(first).capitalize()} {there} {_a(second)}.",
        f"{_a(second).capitalize()} {back} {_a(first)}.",
        f"There is {_a(first)}, and {_a(second)} is {_where(other)}.",
        f"A picture of {_a(first)} {there} {_a(second)}.",
        f"{_where(one).capitalize()} is {_a(first)}, {_where(other)} {_a(second)}.",
    ]


def long_caption(scene: Scene) -> str:
    """Return a long caption of a scene of two things."""
    one, other = scene.things
    there, back = _RELATIONS[one.place]
    return (
        f"The picture shows two things. One of them is {_a(f'{one.size} {language.named(one)}')}, {_where(one)}. "
        f"The other is {_a(f'{other.size} {language.named(other)}')}, {_where(other)}. "
        f"So the {one.shape} is {there} the {other.shape}, and the {other.shape} is {back} the {one.shape}."
    )


def _scenes(rng: np.random.Generator, number: int) -> list[Scene]:
    """Return scenes of which no two have the same colours, shapes and places."""
    found: dict[tuple[tuple[str, str, str], ...], Scene] = {}
    while len(found) < number:
        scene = random_scene(rng, 2)
        if scene.things[0].place in _RELATIONS:
            found.setdefault(tuple((one.color, one.shape, one.place) for one in scene.things), scene)
    return list(found.values())


def _where(thing: Thing) -> str:
    return {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}[thing.place]


def _a(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
