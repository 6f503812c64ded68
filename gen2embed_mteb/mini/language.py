"""English texts about the mini world: captions, questions, and many ways to ask for one word.

Every function draws its wording from a random stream. The texts of the two-level prompt
(`embedder/prompts/strategies.py`) are held out: `one_word_system` and `one_word_user` generate similar requests, but
never one of these sentences. `HELD_OUT` lists them, and the tests check the whole training text for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gen2embed_mteb.mini.world import Scene, Thing

HELD_OUT = (
    "given an image, summarize the provided image in one word",
    "given only text, describe the text in one word",
    "represent the given text in one word",
    "represent the given text/image in one word",
    "represent the given image in one word",
    "summary above image in one word",
    "summary above sentence in one word",
)
"""Instructions, in lower case, that never occur in the mini model's training text."""

_VERBS = (
    "summarize",
    "describe",
    "represent",
    "express",
    "capture",
    "sum up",
    "condense",
    "compress",
    "characterize",
    "name",
    "identify",
)
_ONE_WORD = (
    "in one word",
    "in one word",
    "in one word",
    "in a single word",
    "with one word",
    "using one word",
    "in just one word",
    "in exactly one word",
)
_IMAGE_CASE = (
    "given an image",
    "given a picture",
    "given a photo",
    "for an image",
    "when an image is provided",
    "when there is a picture",
    "if an image is given",
    "if you see a picture",
    "with an image",
)
_IMAGE_NAME = (
    "the image",
    "the given image",
    "the provided image",
    "the provided picture",
    "the picture",
    "it",
    "this image",
    "the image provided",
    "what it shows",
)
_TEXT_CASE = (
    "given only text",
    "given text only",
    "given only a sentence",
    "given just words",
    "for text",
    "when only text is provided",
    "when there is only text",
    "if only text is given",
    "if you see only words",
    "with only text",
)
_TEXT_NAME = (
    "the text",
    "the given text",
    "the provided text",
    "the sentence",
    "it",
    "this text",
    "the words",
    "what it says",
)
SHORT_ANSWER = ("Answer in one word.", "One word only.", "Reply with a single word.", "Use one word.")
_EITHER_NAME = (
    "the given image or text",
    "the given picture/text",
    "the image/text",
    "the given input",
    "the input",
    "everything above",
    "the content",
)


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options, with equal probability."""
    return options[int(rng.integers(len(options)))]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def is_held_out(text: str) -> bool:
    """Return whether the text contains a held-out instruction, in upper or lower case."""
    lowered = text.lower()
    return any(held in lowered for held in HELD_OUT)


def one_word_system(rng: np.random.Generator) -> str:
    """Return a system-level instruction to answer in one word, for images and text; never the prompt itself."""
    while True:
        if rng.random() < 0.15:
            text = _sentence(f"{pick(rng, _VERBS)} {pick(rng, _EITHER_NAME)} {pick(rng, _ONE_WORD)}.")
        else:
            image = f"{pick(rng, _IMAGE_CASE)}, {pick(rng, _VERBS)} {pick(rng, _IMAGE_NAME)} {pick(rng, _ONE_WORD)}."
            words = f"{pick(rng, _TEXT_CASE)}, {pick(rng, _VERBS)} {pick(rng, _TEXT_NAME)} {pick(rng, _ONE_WORD)}."
            pair = (image, words) if rng.random() < 0.8 else (words, image)
            text = " ".join(map(_sentence, pair))
        if not is_held_out(text):
            return text


def one_word_user(rng: np.random.Generator, has_image: bool) -> str:
    """Return a user-level instruction to answer in one word, which follows the input."""
    while True:
        kind = _IMAGE_NAME if has_image else _TEXT_NAME
        name = pick(rng, kind if rng.random() < 0.5 else _EITHER_NAME)
        if rng.random() < 0.2:
            text = pick(rng, SHORT_ANSWER)
        else:
            text = _sentence(f"{pick(rng, _VERBS)} {name} {pick(rng, _ONE_WORD)}.")
        if not is_held_out(text):
            return text


def other_system(rng: np.random.Generator) -> str:
    """Return a system prompt that does not ask for one word."""
    return pick(
        rng,
        (
            "You are a helpful assistant.",
            "Answer in full sentences.",
            "You talk about pictures and text.",
            "Be kind and describe what you are given.",
        ),
    )


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Return a sentence that mentions every attribute in `caption_words` of the scene."""
    if len(scene.things) == 2:
        return _pair_caption(rng, scene)
    thing, background = scene.things[0], scene.background
    shape, color, size = thing.shape, thing.color, thing.size
    where = pick(rng, {"middle": ("in the middle", "in the middle of it")}.get(thing.place, _EDGE)).format(thing.place)
    behind = pick(rng, ("on a {} background", "against a {} background", "over a {} backdrop", "on {}")).format(
        background
    )
    text = pick(
        rng,
        (
            "a {size} {color} {shape} {where} {behind}",
            "a {color} {shape}, {size}, {where} {behind}",
            "{behind}, a {size} {color} {shape} {where}",
            "{where} there is a {size} {color} {shape} {behind}",
            "a {size} {shape} colored {color} {where} {behind}",
            "one {size} {shape} in {color}, {where}, {behind}",
            "the {shape} {where} is {size} and {color}, {behind}",
        ),
    )
    return _finish(text.format(size=size, color=color, shape=shape, where=where, behind=behind))


_EDGE = ("on the {}", "at the {}", "near the {}", "on the {} side")


def caption_words(scene: Scene) -> tuple[str, ...]:
    """Return the attribute words in a full caption of the scene; for two things shapes, colours and background."""
    if len(scene.things) == 1:
        return scene.attributes
    words = [word for thing in scene.things for word in (thing.color, thing.shape)]
    return (*words, scene.background)


def _pair_caption(rng: np.random.Generator, scene: Scene) -> str:
    first, second = scene.things
    forward = {"left": ("to the left of", "left of"), "top": ("above", "on top of")}[first.place]
    reverse = {"left": ("to the right of", "right of"), "top": ("below", "under")}[first.place]
    if rng.random() < 0.5:
        one, relation, other = first, pick(rng, forward), second
    else:
        one, relation, other = second, pick(rng, reverse), first
    text = pick(
        rng,
        (
            "a {one} {relation} a {other} on a {background} background",
            "a {one} is {relation} a {other}, on {background}",
            "on a {background} background, a {one} {relation} a {other}",
            "there is a {one} {relation} a {other} against a {background} backdrop",
        ),
    )
    text = text.format(one=named(one), relation=relation, other=named(other), background=scene.background)
    return _finish(text)


def _finish(text: str) -> str:
    return _sentence(text.replace("a orange", "an orange")) + "."


def named(thing: Thing) -> str:
    """Return the name of a thing by colour and shape, such as "red circle"."""
    return f"{thing.color} {thing.shape}"


def partial_label(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[str, ...]]:
    """Return a short label of one thing, and the attribute words in it."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    forms = (
        (f"{thing.color} {thing.shape}", (thing.color, thing.shape)),
        (f"a {thing.color} {thing.shape}", (thing.color, thing.shape)),
        (f"{thing.shape}", (thing.shape,)),
        (f"{thing.color}", (thing.color,)),
        (f"{thing.place}", (thing.place,)),
        (f"{thing.size}", (thing.size,)),
        (f"{scene.background}", (scene.background,)),
        (f"{thing.size} {thing.shape}", (thing.size, thing.shape)),
        (f"{thing.shape} on the {thing.place}", (thing.shape, thing.place)),
        (f"{thing.shape}, {thing.place}", (thing.shape, thing.place)),
        (f"{thing.shape} on {scene.background}", (thing.shape, scene.background)),
        (f"{thing.color} on {scene.background}", (thing.color, scene.background)),
        (f"{thing.color}, {thing.size}", (thing.color, thing.size)),
    )
    text, words = forms[int(rng.integers(len(forms)))]
    style = rng.random()
    if style < 0.3:
        text = _sentence(text)
    if 0.2 < style < 0.6:
        text += pick(rng, (".", "\n", ".\n"))
    return text, words


def question(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[str, ...], str]:
    """Return a question about the scene: its text, the word(s) that answer it, and the answer as a sentence."""
    if len(scene.things) == 2:
        return _pair_question(rng, scene)
    thing = scene.things[0]
    asked = pick(rng, ("shape", "color", "place", "size", "background"))
    match asked:
        case "shape":
            texts = ("What shape is it?", "Which shape is shown?", "What is the shape of the object?", "What is it?")
            return pick(rng, texts), (thing.shape,), f"The shape is a {thing.shape}."
        case "color":
            texts = (
                f"What color is the {thing.shape}?",
                "What color is the object?",
                "Which color does it have?",
                "What is its color?",
            )
            return pick(rng, texts), (thing.color,), f"The color is {thing.color}."
        case "place":
            texts = (f"Where is the {thing.shape}?", "Where is the object?", "In which place is it?", "Where is it?")
            return pick(rng, texts), (thing.place,), f"The object is at the {thing.place}."
        case "size":
            texts = (f"How big is the {thing.shape}?", "What size is the object?", "How large is it?", "What size?")
            return pick(rng, texts), (thing.size,), f"The object is {thing.size}."
        case _:
            texts = (
                "What color is the background?",
                "Which color is behind the object?",
                f"What is behind the {thing.shape}?",
                "What is the background color?",
            )
            return pick(rng, texts), (scene.background,), f"The background is {scene.background}."


def _pair_question(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[str, ...], str]:
    thing = scene.things[int(rng.integers(2))]
    match int(rng.integers(4)):
        case 0:
            texts = (f"What color is the {thing.shape}?", f"Which color does the {thing.shape} have?")
            return pick(rng, texts), (thing.color,), f"The color is {thing.color}."
        case 1:
            texts = (f"Which shape is {thing.color}?", f"What is the {thing.color} object?")
            return pick(rng, texts), (thing.shape,), f"The shape is a {thing.shape}."
        case 2:
            texts = (f"What shape is on the {thing.place}?", f"Which shape is at the {thing.place}?")
            return pick(rng, texts), (thing.shape,), f"The shape is a {thing.shape}."
        case _:
            texts = (f"What color is on the {thing.place}?", f"Which color has the object at the {thing.place}?")
            return pick(rng, texts), (thing.color,), f"The color is {thing.color}."


def neighbour_question(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[str, ...], str]:
    """Return a question about the other one of two things: its text, the word that answers it, and a sentence."""
    asked, other = (scene.things[i] for i in rng.permutation(2))
    name = pick(rng, (named(asked), named(asked), asked.shape, f"{asked.color} object"))
    if rng.random() < 0.6:
        texts = ("Which shape is next to the {}?", "What is beside the {}?", "Name the shape near the {}.")
        return pick(rng, texts).format(name), (other.shape,), f"Next to it is a {other.shape}."
    texts = ("Which color is next to the {}?", "What color is the neighbor of the {}?", "Name the color near the {}.")
    return pick(rng, texts).format(name), (other.color,), f"Next to it is something {other.color}."


def pointer(rng: np.random.Generator, scene: Scene) -> tuple[str, Thing]:
    """Return a request to look at one thing of a two-thing scene, and that thing."""
    thing = scene.things[int(rng.integers(len(scene.things)))]
    name = pick(
        rng,
        (
            named(thing),
            named(thing),
            thing.shape,
            f"{thing.color} object",
            f"object on the {thing.place}",
            f"{thing.shape} on the {thing.place}",
        ),
    )
    text = pick(
        rng,
        (
            "Focus on the {}.",
            "Look only at the {}.",
            'Select the part of the image that shows the object labeled "{}"',
            'Pick the portion of the picture with the "{}"',
            "Find the region of the image that contains the {}",
            "Crop the image to the {}.",
        ),
    )
    return text.format(name), thing


def change(rng: np.random.Generator, thing: Thing, colors: Sequence[str], shapes: Sequence[str]) -> tuple[str, Thing]:
    """Return a request to change one attribute of a thing, and the changed thing."""
    if rng.random() < 0.5:
        color = pick(rng, [name for name in colors if name != thing.color])
        text = pick(rng, ("The same but {}.", "Make it {}.", "Change the color to {}.", "Like this one, but in {}."))
        return text.format(color), Thing(thing.shape, color, thing.place, thing.size)
    shape = pick(rng, [name for name in shapes if name != thing.shape])
    text = pick(rng, ("The same but a {}.", "Make it a {}.", "Change the shape to a {}.", "Like this, but a {}."))
    return text.format(shape), Thing(shape, thing.color, thing.place, thing.size)


_FIND = (
    "Find me an image that fits this caption: {}",
    "Find a picture that matches the caption: {}",
    "Find me an everyday picture with this description: {}",
    "Retrieve an image for the given description: {}",
    "Search a picture of this: {}",
    "Retrieve a sentence that means the same: {}",
    "Represent this sentence for search: {}",
    "Represent the following caption: {}",
    "Text: {}",
    "Caption: {}",
)
_ABOUT_IMAGE = (
    "Represent this image.",
    "Represent the picture shown.",
    "Represent the given picture.",
    "Represent the cropped picture of the object.",
    "Find a caption for this picture.",
    "Find an image caption that describes the given picture.",
    "Find a picture like this one.",
    "Find me another image that looks alike.",
    "Classify the image.",
    "Represent the picture for classification.",
    "What does the image show?",
)


def find_request(rng: np.random.Generator, text: str) -> str:
    """Return a request to search, with the text in it."""
    return pick(rng, _FIND).format(text)


def image_request(rng: np.random.Generator) -> str:
    """Return an instruction about a whole image that names no attribute."""
    return pick(rng, _ABOUT_IMAGE)


def attribute_request(rng: np.random.Generator, scene: Scene) -> tuple[str, tuple[str, ...]]:
    """Return an instruction to identify one or two kinds of attribute, and the words it asks for."""
    thing = scene.things[0]
    kinds = {
        "shape": thing.shape,
        "color": thing.color,
        "place": thing.place,
        "size": thing.size,
        "background": scene.background,
    }
    names = list(kinds)
    chosen = [names[i] for i in rng.permutation(len(names))[: 1 + int(rng.integers(2))]]
    text = pick(
        rng,
        ("Identify the {}.", "Identify the {} shown in the picture.", "Name the {} in the image.", "Which {}?"),
    )
    return text.format(" and the ".join(chosen)), tuple(kinds[name] for name in chosen)


_IMAGE_REPLY = ("This picture shows", "The image contains", "Here we see", "You can see", "It shows", "I see")
_TEXT_REPLY = ("The text is about", "You wrote about", "This sentence describes", "That means", "It says", "Here is")


def reply(rng: np.random.Generator, text: str, about_image: bool) -> str:
    """Return the longer answer of a model that was not asked for one word: an opening, then the content."""
    opening = pick(rng, _IMAGE_REPLY if about_image else _TEXT_REPLY)
    text = text.strip()
    return f"{opening} {text[0].lower()}{text[1:]}"
