"""The datasets of MMEB-mini: the query, the positive and the hard candidates of each.

A maker turns images into `Pair`s in the form of MMEB's V2 (text and image separate, one instruction per dataset).
Each positive has a `truth`: pairs with equal truth are positives of each other, whether they are labelled so or not, so
that false negatives can be counted. `benchmark.py` draws candidates, composes the columns and writes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from gen2embed_mteb.mini import language
from gen2embed_mteb.mini.corpus import Picture
from gen2embed_mteb.mini.world import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    crop_of,
    draw,
    random_scene,
)
from gen2embed_mteb.mmeb.datasets import DatasetInfo, Form


@dataclass(frozen=True)
class Target:
    """A candidate: a text, an image, or both, and its `truth`, which is equal for candidates with the same meaning."""

    text: str
    pixels: np.ndarray | None
    truth: str


@dataclass(frozen=True)
class Pair:
    """A query with its positive.

    Attributes:
        text: The query's text without the instruction.
        pixels: The query's image, (64, 64, 3) uint8, or None.
        positive: The labelled positive.
        hard: Candidates that the row must contain; the first is the training negative.
    """

    text: str
    pixels: np.ndarray | None
    positive: Target
    hard: tuple[Target, ...] = field(default=())


Maker = Callable[[np.random.Generator, int], list[Pair]]
Artist = Callable[[np.random.Generator, int], list[Picture]]

RENDERINGS = 8
"""The average number of training pairs per scene in the caption datasets, each with its own image and caption.

Real captions say less than their images show: a caption of MSCOCO fits 8.5 of its images on average, of which one is
labelled (ECCV Caption, arXiv:2204.03359). Without such unlabelled positives the nearest candidates of a training query
would all be good negatives, which is not so on real data."""


@dataclass(frozen=True)
class MiniTask:
    """One dataset.

    Attributes:
        info: Name, meta-task, domain and form.
        query_instructions: The first is used in the benchmark, the others only in the split `diverse_instruction`.
        target_instruction: The instruction of candidates; empty for plain text.
        num_candidates: The number of candidates per row, including the positive.
        make: Makes pairs.
        labels: All labels of a classification dataset; candidates are drawn from them instead of from other rows.
        num_train: The number of training pairs; 0 for datasets out of domain.
        make_train: Makes training pairs, if they are drawn in another way than those of the evaluation.
    """

    info: DatasetInfo
    query_instructions: tuple[str, ...]
    target_instruction: str
    num_candidates: int
    make: Maker
    labels: tuple[str, ...] = ()
    num_train: int = 0
    make_train: Maker | None = None


def _singles(rng: np.random.Generator, count: int, noise: float = 6.0) -> list[Picture]:
    scenes = [random_scene(rng) for _ in range(count)]
    return [Picture(draw(scene, rng, noise), scene) for scene in scenes]


def _repeated_singles(rng: np.random.Generator, count: int) -> list[Picture]:
    """Return images of few scenes, on average `RENDERINGS` of each."""
    scenes = [random_scene(rng) for _ in range(max(1, count // RENDERINGS))]
    chosen = [scenes[number] for number in rng.integers(len(scenes), size=count)]
    return [Picture(draw(scene, rng), scene) for scene in chosen]


def _pairs(rng: np.random.Generator, count: int) -> list[Picture]:
    scenes = [random_scene(rng, 2) for _ in range(count)]
    return [Picture(draw(scene, rng), scene) for scene in scenes]


def scene_key(scene: Scene) -> str:
    """Return a scene as one string; equal scenes have equal keys."""
    return "; ".join(" ".join((t.size, t.color, t.shape, t.place)) for t in scene.things) + f"; {scene.background}"


def _labelled(label_of: Callable[[Scene], str], noise: float = 6.0) -> Maker:
    def make(rng: np.random.Generator, count: int) -> list[Pair]:
        pictures = _singles(rng, count, noise)
        return [Pair("", p.pixels, Target(label_of(p.scene), None, label_of(p.scene))) for p in pictures]

    return make


def _attribute_questions(rng: np.random.Generator, count: int) -> list[Pair]:
    return [_question(rng, picture) for picture in _singles(rng, count)]


def _pair_questions(rng: np.random.Generator, count: int) -> list[Pair]:
    return [_question(rng, picture) for picture in _pairs(rng, count)]


def _question(rng: np.random.Generator, picture: Picture) -> Pair:
    text, words, _ = language.question(rng, picture.scene)
    return Pair(text, picture.pixels, Target(words[0], None, words[0]))


def _relation_questions(rng: np.random.Generator, count: int) -> list[Pair]:
    """Return questions about the thing beside a named thing; the named thing is the hard candidate."""
    rows = []
    for picture in _pairs(rng, count):
        asked, other = (picture.scene.things[i] for i in rng.permutation(2))
        text = f"Beside the {language.named(asked)}, which shape is there?"
        hard = Target(asked.shape, None, asked.shape)
        rows.append(Pair(text, picture.pixels, Target(other.shape, None, other.shape), (hard,)))
    return rows


def _captions_to_images(pictures_of: Artist) -> Maker:
    def make(rng: np.random.Generator, count: int) -> list[Pair]:
        return [
            Pair(language.caption(rng, p.scene), None, Target("", p.pixels, scene_key(p.scene)))
            for p in pictures_of(rng, count)
        ]

    return make


def _images_to_captions(pictures_of: Artist) -> Maker:
    def make(rng: np.random.Generator, count: int) -> list[Pair]:
        return [
            Pair("", p.pixels, Target(language.caption(rng, p.scene), None, scene_key(p.scene)))
            for p in pictures_of(rng, count)
        ]

    return make


def _changes(rng: np.random.Generator, count: int) -> list[Pair]:
    """Return queries of an image and a change to it; the unchanged scene, drawn again, is the hard candidate."""
    rows = []
    for picture in _singles(rng, count):
        text, thing = language.change(rng, picture.scene.things[0], list(COLORS), SHAPES)
        wanted = Scene((thing,), picture.scene.background)
        hard = Target("", draw(picture.scene, rng), scene_key(picture.scene))
        rows.append(Pair(text, picture.pixels, Target("", draw(wanted, rng), scene_key(wanted)), (hard,)))
    return rows


def _web_pages(rng: np.random.Generator, count: int) -> list[Pair]:
    """Return text-only queries with an image marker, as in WebQA; candidates are images with captions."""
    rows = []
    for picture in _singles(rng, count):
        target = Target(language.caption(rng, picture.scene), picture.pixels, scene_key(picture.scene))
        rows.append(Pair(language.caption(rng, picture.scene), None, target))
    return rows


def _crops(name_of: Callable[[Thing], str]) -> Maker:
    def make(rng: np.random.Generator, count: int) -> list[Pair]:
        rows = []
        for picture in _pairs(rng, count):
            asked, other = (picture.scene.things[i] for i in rng.permutation(2))
            targets = [
                Target("", crop_of(picture.pixels, t), f"{language.named(t)} on {picture.scene.background}")
                for t in (asked, other)
            ]
            rows.append(Pair(f'"{name_of(asked)}"', picture.pixels, targets[0], (targets[1],)))
        return rows

    return make


def _matching(rng: np.random.Generator, count: int) -> list[Pair]:
    """Return pairs of two expressions for the same thing; the hard candidate is the image with the other thing."""
    rows = []
    for picture in _pairs(rng, count):
        asked, other = (picture.scene.things[i] for i in rng.permutation(2))
        key = scene_key(picture.scene)
        positive, hard = (
            Target(f'"{t.shape} on the {t.place}"', picture.pixels, f"{key}: {t.place}") for t in (asked, other)
        )
        rows.append(Pair(f'"{language.named(asked)}"', picture.pixels, positive, (hard,)))
    return rows


def digit_maker(digits: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Maker:
    """Return a maker of pairs of scikit-learn's handwritten digits and their names."""

    def make(rng: np.random.Generator, count: int) -> list[Pair]:
        images, labels = digits()
        order = rng.permutation(len(labels))[:count]
        return [Pair("", images[i], Target(DIGITS[labels[i]], None, DIGITS[labels[i]])) for i in order]

    return make


def _joined(*words: Iterable[str], form: str) -> tuple[str, ...]:
    return tuple(form.format(*chosen) for chosen in product(*words))


_WORDS = (*SHAPES, *COLORS, *PLACES, *SIZES, *BACKGROUNDS)
_FIND = "Find me a picture that matches the given caption:"
_SELECT = "Select the portion of the image that isolates the object labeled"
_LOOK_AT = "<|image_1|>\nRepresent the given picture."


def _info(name: str, meta_task: str, form: Form, in_domain: bool, **kwargs: bool) -> DatasetInfo:
    return DatasetInfo(name, meta_task, in_domain, form, **kwargs)  # type: ignore[arg-type]


def _color_shape(scene: Scene) -> str:
    return language.named(scene.things[0])


def _shape_place(scene: Scene) -> str:
    return f"{scene.things[0].shape}, {scene.things[0].place}"


def _shape_background(scene: Scene) -> str:
    return f"{scene.things[0].shape} on {scene.background}"


_COLOR_SHAPES = _joined(COLORS, SHAPES, form="{} {}")


def tasks(digits: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[MiniTask, ...]:
    """Return all datasets, in the order of reports.

    Args:
        digits: Returns the handwritten digits for training or for the test.
    """
    classify = "Identify the {} shown in the image"
    return (
        MiniTask(
            _info("ColorShape", "Classification", "label", True),
            (classify.format("color and the shape"), "Name the color and the shape of the object"),
            "",
            64,
            _labelled(_color_shape),
            _COLOR_SHAPES,
            2500,
        ),
        MiniTask(
            _info("ShapePlace", "Classification", "label", True),
            (classify.format("shape and the place"), "Tell the shape and where it is"),
            "",
            40,
            _labelled(_shape_place),
            _joined(SHAPES, PLACES, form="{}, {}"),
            1500,
        ),
        MiniTask(
            _info("Digits", "Classification", "label", True),
            (classify.format("digit"), "Which digit is written here?"),
            "",
            10,
            digit_maker(digits),
            DIGITS,
            1297,
        ),
        MiniTask(
            _info("ShapeBackground", "Classification", "label", False),
            (classify.format("shape and the background"),),
            "",
            32,
            _labelled(_shape_background),
            _joined(SHAPES, BACKGROUNDS, form="{} on {}"),
        ),
        MiniTask(
            _info("ColorShape-Noisy", "Classification", "label", False),
            ("Represent the given image for classification of color and shape",),
            "",
            64,
            _labelled(_color_shape, noise=24.0),
            _COLOR_SHAPES,
        ),
        MiniTask(
            _info("AttributeQA", "VQA", "question", True),
            ("<|image_1|>\nRepresent the given image with the following question:", "<|image_1|>\nAnswer this:"),
            "",
            len(_WORDS),
            _attribute_questions,
            _WORDS,
            2000,
        ),
        MiniTask(
            _info("PairQA", "VQA", "question", True),
            ("<|image_1|>\nRepresent the given image with the following question:", "<|image_1|>\nAnswer this:"),
            "",
            len(_WORDS),
            _pair_questions,
            _WORDS,
            1500,
        ),
        MiniTask(
            _info("RelationQA", "VQA", "question", False),
            ("<|image_1|>\nRepresent the given image with the following question:",),
            "",
            len(_WORDS),
            _relation_questions,
            _WORDS,
        ),
        MiniTask(
            _info("Scenes_t2i", "Retrieval", "text-to-image", True),
            (_FIND, "Look for an image with this caption:"),
            _LOOK_AT,
            100,
            _captions_to_images(_singles),
            num_train=2400,
            make_train=_captions_to_images(_repeated_singles),
        ),
        MiniTask(
            _info("Scenes_i2t", "Retrieval", "label", True),
            ("Find an image caption describing the given image", "What does the image show?"),
            "",
            100,
            _images_to_captions(_singles),
            num_train=1500,
            make_train=_images_to_captions(_repeated_singles),
        ),
        MiniTask(
            _info("Changed", "Retrieval", "image-to-image", True),
            ("<|image_1|>\nGiven an image, find another one with the following change:", "<|image_1|>\nImagine this:"),
            _LOOK_AT,
            50,
            _changes,
            num_train=1000,
        ),
        MiniTask(
            _info("Pairs_t2i", "Retrieval", "text-to-image", False),
            (_FIND,),
            _LOOK_AT,
            50,
            _captions_to_images(_pairs),
        ),
        MiniTask(
            _info("WebPages", "Retrieval", "text-to-image", False),
            ("<|image_1|>\nFind a picture with a caption that says:",),
            "<|image_1|>\nRepresent the given picture with its caption:",
            50,
            _web_pages,
        ),
        MiniTask(
            _info("Pointing", "Grounding", "image-to-image", True),
            (f"<|image_1|>\n{_SELECT}", "<|image_1|>\nWhere in the image is the"),
            "<|image_1|>\nRepresent the given cropped image of the object",
            50,
            _crops(language.named),
            num_train=1500,
        ),
        MiniTask(
            _info("Pointing-Place", "Grounding", "image-to-image", False),
            ("<|image_1|>\nSelect the portion of the image that shows the object on the side named",),
            "<|image_1|>\nRepresent the given cropped image of the object",
            50,
            _crops(lambda thing: thing.place),
        ),
        MiniTask(
            _info("Pointing-Matching", "Grounding", "image-to-image", False, candidates_as_queries=True),
            ("<|image_1|>\nSelect the portion of the image that follows the language expressions:",),
            "<|image_1|>\nSelect the portion of the image that follows the language expressions:",
            50,
            _matching,
        ),
    )
