"""The mini model's training conversations (system, user, image) -> answer, generated from a random stream.

- `first_lesson` comes first: lists of an image's attributes and short questions about it. Without it, shapes are
  learned late or never.
- `conversation` is the whole mixture: captions, questions, labels, search requests, references to one thing, and
  changes, with a request for one word at system level, at user level, at both, or at none. If one word is requested,
  the answer is drawn evenly from *all* attributes in the input, so that the model's last state must encode all of them;
  a question keeps its own answer.
- `reading_lesson` is the mixture with added lists of the attributes in a caption or an image.
- `shape_lesson` consists mostly of single things, and `question_lesson` of questions before the request for one word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gen2embed_mteb.mini import language
from gen2embed_mteb.mini.world import COLORS, DIGITS, SHAPES, Scene, Thing, crop_of, draw, random_scene

ONE_WORD_LEVELS = ("system", "user", "both", "none")
_LEVEL_WEIGHTS = np.cumsum((0.42, 0.12, 0.31, 0.15))
_QUESTION_LEVEL_WEIGHTS = np.cumsum((0.12, 0.22, 0.52, 0.14))


@dataclass(frozen=True)
class Picture:
    """A drawn image, (SIDE, SIDE, 3) uint8, with the scene that it shows."""

    pixels: np.ndarray
    scene: Scene


@dataclass(frozen=True)
class Conversation:
    """One training example. `user` is the text after the image, if there is one."""

    system: str | None
    user: str
    pixels: np.ndarray | None
    answer: str


class Album:
    """A set of images that are drawn once and reused: single things, pairs, and scikit-learn's handwritten digits.

    Args:
        rng: The source of the scenes and of their drawing.
        num_pictures: The number of images of single things, and of pairs.
        digits: (n, SIDE, SIDE, 3) uint8 images and their (n,) labels 0-9; may be empty.
    """

    def __init__(self, rng: np.random.Generator, num_pictures: int, digits: tuple[np.ndarray, np.ndarray]) -> None:
        """Draw the images, which takes about half a millisecond per image."""
        self.singles = [_picture(rng, 1) for _ in range(num_pictures)]
        self.pairs = [_picture(rng, 2) for _ in range(num_pictures)]
        self.digit_images, self.digit_labels = digits


def _picture(rng: np.random.Generator, num_things: int) -> Picture:
    scene = random_scene(rng, num_things)
    return Picture(draw(scene, rng, noise=float(rng.uniform(0, 9))), scene)


def first_lesson(rng: np.random.Generator, album: Album) -> Conversation:
    """Return an image with a list of all its attributes in fixed order, or with a short question and its answer."""
    picture = _any_picture(rng, album, pairs=0.25)
    if rng.random() < 0.7:
        listed = [word for t in picture.scene.things for word in (t.color, t.shape, t.size, t.place)]
        return Conversation(None, "List what you see.", picture.pixels, " ".join([*listed, picture.scene.background]))
    text, words, _ = language.question(rng, picture.scene)
    return Conversation(None, f"{text} {language.pick(rng, language.SHORT_ANSWER)}", picture.pixels, words[0])


def reading_lesson(rng: np.random.Generator, album: Album) -> Conversation:
    """Return an example of the whole mixture, or a list of all attributes in a caption or an image."""
    kind = rng.random()
    if kind < 0.7:
        return conversation(rng, album)
    if kind < 0.82:
        return first_lesson(rng, album)
    scene = random_scene(rng, 1 if rng.random() < 0.6 else 2)
    if len(scene.things) == 1:
        thing = scene.things[0]
        listed = [thing.color, thing.shape, thing.size, thing.place, scene.background]
    else:
        listed = [word for thing in scene.things for word in (thing.color, thing.shape)] + [scene.background]
    text = language.caption(rng, scene)
    if rng.random() < 0.3:
        text = language.find_request(rng, text)
    system = language.one_word_system(rng) if rng.random() < 0.2 else None
    return Conversation(system, f"{text}\nList what you read.", None, " ".join(listed))


def shape_lesson(rng: np.random.Generator, album: Album) -> Conversation:
    """Return an example for learning shapes, which are learned last: mostly a list of the attributes of one thing."""
    kind = rng.random()
    if kind < 0.2:
        return conversation(rng, album)
    scene, pixels, text = random_scene(rng), None, ""
    if kind < 0.75:
        picture = _any_picture(rng, album, pairs=0.0)
        scene, pixels = picture.scene, picture.pixels
    elif kind < 0.88:
        label, words = language.partial_label(rng, scene)
        return Conversation(language.one_word_system(rng), label, None, language.pick(rng, words))
    else:
        text = language.caption(rng, scene) + "\n"
    thing = scene.things[0]
    listed = f"{thing.color} {thing.shape} {thing.size} {thing.place} {scene.background}"
    return Conversation(None, f"{text}List what you {'see' if text == '' else 'read'}.", pixels, listed)


def question_lesson(rng: np.random.Generator, album: Album) -> Conversation:
    """Return a question or request about a part of an image, mostly followed by a user-level request for one word."""
    kind = rng.random()
    if kind < 0.35:
        return shape_lesson(rng, album)
    if kind < 0.45:
        return first_lesson(rng, album)
    if kind < 0.55:
        return conversation(rng, album)
    make = (_question, _question, _neighbour, _attributes, _pointing, _digit)[int(rng.integers(6))]
    return make(rng, album, _QUESTION_LEVEL_WEIGHTS)


def conversation(rng: np.random.Generator, album: Album) -> Conversation:
    """Return one example of the whole mixture."""
    kind = rng.random()
    for limit, make in _MIXTURE:
        if kind < limit:
            return make(rng, album)
    raise AssertionError("the mixture's limits end at 1.0")


def _any_picture(rng: np.random.Generator, album: Album, pairs: float) -> Picture:
    pool = album.pairs if rng.random() < pairs else album.singles
    return pool[int(rng.integers(len(pool)))]


def _ask(
    rng: np.random.Generator,
    user: str,
    pixels: np.ndarray | None,
    words: tuple[str, ...],
    sentence: str,
    *,
    level_weights: np.ndarray = _LEVEL_WEIGHTS,
) -> Conversation:
    """Return a conversation that asks for one of the words, drawn evenly, at one or both levels; or for no word.

    Without a request for one word, the answer is the sentence.
    """
    level = ONE_WORD_LEVELS[int(np.searchsorted(level_weights, rng.random(), side="right"))]
    if pixels is not None and user and rng.random() < 0.7:
        user = "\n" + user
    if user and rng.random() < 0.5:
        user += "\n"
    if level == "none":
        system = language.other_system(rng) if rng.random() < 0.2 else None
        return Conversation(system, user, pixels, sentence)
    system = language.one_word_system(rng) if level in ("system", "both") else None
    if level in ("user", "both"):
        user += ("\n" if user and rng.random() < 0.8 else " " if user else "") + language.one_word_user(
            rng, pixels is not None
        )
    return Conversation(system, user, pixels, language.pick(rng, words))


def _about_image(rng: np.random.Generator, album: Album) -> Conversation:
    picture = _any_picture(rng, album, pairs=0.35)
    words, pixels = language.caption_words(picture.scene), picture.pixels
    text = language.caption(rng, picture.scene)
    if len(picture.scene.things) == 2 and rng.random() < 0.4:
        thing = picture.scene.things[int(rng.integers(2))]
        pixels, words = crop_of(picture.pixels, thing), (thing.shape, thing.color, picture.scene.background)
        text = f"A {language.named(thing)} on a {picture.scene.background} background."
    user = "" if rng.random() < 0.4 else language.image_request(rng)
    return _ask(rng, user, pixels, words, language.reply(rng, text, True))


def _about_caption(rng: np.random.Generator, album: Album) -> Conversation:
    scene = random_scene(rng, 1 if rng.random() < 0.6 else 2)
    text = language.caption(rng, scene)
    user = text if rng.random() < 0.5 else language.find_request(rng, text)
    return _ask(rng, user, None, language.caption_words(scene), language.reply(rng, text, False))


def _about_label(rng: np.random.Generator, album: Album) -> Conversation:
    text, words = language.partial_label(rng, random_scene(rng, 1))
    if rng.random() < 0.08:
        digit = language.pick(rng, DIGITS)
        text, words = (
            language.pick(rng, ("{}", "the digit {}", "The number {}.", "a handwritten {}")).format(digit),
            (digit,),
        )
    return _ask(rng, text, None, words, language.reply(rng, text, False))


def _question(rng: np.random.Generator, album: Album, level_weights: np.ndarray = _LEVEL_WEIGHTS) -> Conversation:
    picture = _any_picture(rng, album, pairs=0.5)
    text, words, sentence = language.question(rng, picture.scene)
    if rng.random() < 0.3:
        text = language.pick(rng, ("Question: {}", "Represent the image with this question: {}")).format(text)
    if rng.random() < 0.12:
        about = language.caption(rng, picture.scene)
        return _ask(rng, f"{about} {text}", None, words, sentence, level_weights=level_weights)
    return _ask(rng, text, picture.pixels, words, sentence, level_weights=level_weights)


def _neighbour(rng: np.random.Generator, album: Album, level_weights: np.ndarray) -> Conversation:
    picture = _any_picture(rng, album, pairs=1.0)
    text, words, sentence = language.neighbour_question(rng, picture.scene)
    return _ask(rng, text, picture.pixels, words, sentence, level_weights=level_weights)


def _attributes(rng: np.random.Generator, album: Album, level_weights: np.ndarray = _LEVEL_WEIGHTS) -> Conversation:
    picture = _any_picture(rng, album, pairs=0.0)
    text, words = language.attribute_request(rng, picture.scene)
    return _ask(rng, text, picture.pixels, words, f"It is {' and '.join(words)}.", level_weights=level_weights)


def _pointing(rng: np.random.Generator, album: Album, level_weights: np.ndarray = _LEVEL_WEIGHTS) -> Conversation:
    picture = _any_picture(rng, album, pairs=1.0)
    text, thing = language.pointer(rng, picture.scene)
    words = (thing.shape, thing.color, picture.scene.background)
    return _ask(rng, text, picture.pixels, words, f"It is the {language.named(thing)}.", level_weights=level_weights)


def _changing(rng: np.random.Generator, album: Album) -> Conversation:
    picture = _any_picture(rng, album, pairs=0.0)
    text, thing = language.change(rng, picture.scene.things[0], list(COLORS), SHAPES)
    scene = Scene((Thing(thing.shape, thing.color, thing.place, thing.size),), picture.scene.background)
    return _ask(rng, text, picture.pixels, scene.attributes, f"Then it is a {language.named(thing)}.")


def _digit(rng: np.random.Generator, album: Album, level_weights: np.ndarray = _LEVEL_WEIGHTS) -> Conversation:
    if not len(album.digit_labels):
        return _about_label(rng, album)
    index = int(rng.integers(len(album.digit_labels)))
    word = DIGITS[int(album.digit_labels[index])]
    request = language.pick(rng, ("", "Which digit is it?", "Identify the digit.", "Name the number shown."))
    pixels = album.digit_images[index]
    return _ask(
        rng, request, pixels, (word,), language.reply(rng, f"A handwritten {word}.", True), level_weights=level_weights
    )


_MIXTURE = (
    (0.24, _about_image),
    (0.42, _about_caption),
    (0.56, _about_label),
    (0.72, _question),
    (0.80, _attributes),
    (0.89, _pointing),
    (0.94, _changing),
    (1.00, _digit),
)
