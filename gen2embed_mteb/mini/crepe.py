"""SugarCrepe-mini and SugarCrepe++-mini: the JSON form of the originals, with images of the mini world.

A record has a caption and a hard negative, which differ by one replaced, swapped or added object, attribute or
relation; the ++ form adds a second caption with the same meaning in other words.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.mini import language
from gen2embed_mteb.mini.places import CREPE_IMAGES, SUGARCREPE, SUGARCREPE_PLUS
from gen2embed_mteb.mini.world import COLORS, SHAPES, Scene, Thing, draw, random_scene
from gen2embed_mteb.storage.atomic import write_atomic
from gen2embed_mteb.sugarcrepe.scoring import SUGARCREPE_BENCHMARK, SUGARCREPE_PLUS_BENCHMARK

NUM_RECORDS = 150


def write_crepe(root: Path, rng: np.random.Generator) -> None:
    """Write `SugarCrepe/*.json`, `SugarCrepe++/*.json` and their images, `val2017/*.png`, under `root`."""
    images = root / CREPE_IMAGES
    images.mkdir(parents=True)
    for folder, benchmark in ((SUGARCREPE, SUGARCREPE_BENCHMARK), (SUGARCREPE_PLUS, SUGARCREPE_PLUS_BENCHMARK)):
        (root / folder).mkdir()
        for file in benchmark.sets.values():
            records = {}
            for index in range(NUM_RECORDS):
                scene = random_scene(rng, 2)
                filename = f"{folder.replace('+', 'p')}-{file}-{index:04d}.png"
                Image.fromarray(draw(scene, rng)).save(images / filename, compress_level=1)
                captions = _captions(rng, file, scene)
                values = captions if len(benchmark.captions) > 2 else (captions[0], captions[2])
                records[str(index)] = {"filename": filename, **dict(zip(benchmark.captions, values, strict=True))}
            write_atomic(root / folder / f"{file}.json", (json.dumps(records, indent=1) + "\n").encode())


def _captions(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, str, str]:
    """Return a caption, a second caption with the same meaning, and the hard negative."""
    if kind in ("add_obj", "add_att"):
        return _added(rng, kind, scene)
    first, second = scene.things
    relation = _RELATIONS[first.place]
    caption = _sentence(first, relation[0], second)
    same = _sentence(second, relation[1], first)
    other_color = language.pick(rng, [c for c in COLORS if c not in (first.color, second.color)])
    other_shape = language.pick(rng, [s for s in SHAPES if s not in (first.shape, second.shape)])
    match kind:
        case "replace_obj":
            negative = _sentence(replace(first, shape=other_shape), relation[0], second)
        case "replace_att":
            negative = _sentence(replace(first, color=other_color), relation[0], second)
        case "replace_rel":
            negative = _sentence(first, relation[1], second)
        case "swap_obj":
            negative = _sentence(second, relation[0], first)
        case "swap_att":
            negative = _sentence(replace(first, color=second.color), relation[0], replace(second, color=first.color))
        case _:
            raise Gen2EmbedError(f"unknown set {kind!r}")
    return caption, same, negative


_RELATIONS = {"left": ("to the left of", "to the right of"), "top": ("above", "below")}


def _sentence(one: Thing, relation: str, other: Thing) -> str:
    return f"A {language.named(one)} {relation} a {language.named(other)}.".replace("a orange", "an orange").replace(
        "A orange", "An orange"
    )


def _added(rng: np.random.Generator, kind: str, scene: Scene) -> tuple[str, str, str]:
    first, second = scene.things
    caption = f"A {first.shape} and a {second.shape}."
    same = f"A {second.shape} and a {first.shape}."
    if kind == "add_obj":
        extra = language.pick(rng, [s for s in SHAPES if s not in (first.shape, second.shape)])
        return caption, same, f"A {first.shape}, a {second.shape} and a {extra}."
    wrong = language.pick(rng, [c for c in COLORS if c != first.color])
    return caption, same, f"A {wrong} {first.shape} and a {second.shape}."
