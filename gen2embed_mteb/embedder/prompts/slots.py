"""The slots of prompts per task: for each dataset what its queries and targets are, and by what they are compared.

The strategies `freeret` and `lens` put these words into their sentences (see `prompts`). A dataset that is not in the
table gets `DEFAULT_SLOTS`, which fit any task and say little.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields

from gen2embed_mteb.errors import Gen2EmbedError


@dataclass(frozen=True)
class TaskSlots:
    """The words that a prompt per task says of a task.

    Attributes:
        query: What a query is: a noun with its article, such as "a photo with a question".
        target: What a candidate is, likewise.
        aspect: By what they are compared, likewise: "the object that is shown".
    """

    query: str
    target: str
    aspect: str

    def __post_init__(self) -> None:
        """Check every slot.

        Raises:
            Gen2EmbedError: A slot is empty, no text, or has a line break.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not value.strip() or len(value.splitlines()) != 1:
                raise Gen2EmbedError(
                    f"slot {field.name} is {value!r}; pass a noun with its article on one line, such as 'a photo'"
                )


DEFAULT_SLOTS = TaskSlots("an input", "a candidate", "the meaning")
"""The slots of a task of which nothing is known."""

_CROP = "a cut-out of a photo"
_CROPPED = "a cut-out of a picture"
_OBJECT = ("the name of an object", "the object that is shown")
_PLACE = ("a photo of a place", "the name of a kind of place", "the kind of place")
_PHOTO_QUESTION = TaskSlots("a photo with a question", "an answer", "what the question asks for")
_EXPRESSION = "a photo with an expression that points at an object"
_MINI_QUESTION = TaskSlots("a picture with a question", "an answer", "what the question asks for")
_MINI_EXPRESSION = "a picture with an expression that points at an object"

MMEB_SLOTS: dict[str, TaskSlots] = {
    "ImageNet-1K": TaskSlots("a photo", *_OBJECT),
    "ImageNet_1K": TaskSlots("a photo", *_OBJECT),  # its name in the training data
    "N24News": TaskSlots("a news photo with its text", "the name of a news section", "the topic of the news"),
    "HatefulMemes": TaskSlots("a meme with its text", "a yes or a no", "whether the meme is hateful"),
    "VOC2007": TaskSlots("a photo", *_OBJECT),
    "SUN397": TaskSlots(*_PLACE),
    "Place365": TaskSlots(*_PLACE),
    "ImageNet-A": TaskSlots("an unusual photo of an object", *_OBJECT),
    "ImageNet-R": TaskSlots("a drawing or another rendition of an object", *_OBJECT),
    "ObjectNet": TaskSlots("a photo of an object", *_OBJECT),
    "Country211": TaskSlots("a photo", "the name of a country", "the country in which the photo was taken"),
    "OK-VQA": _PHOTO_QUESTION,
    "A-OKVQA": _PHOTO_QUESTION,
    "DocVQA": TaskSlots("a page of a document with a question", "an answer", "what the question asks for"),
    "InfographicsVQA": TaskSlots("an infographic with a question", "an answer", "what the question asks for"),
    "ChartQA": TaskSlots("a chart with a question", "an answer", "what the question asks for"),
    "Visual7W": _PHOTO_QUESTION,
    "ScienceQA": TaskSlots("a picture with a question of science", "an answer", "what the question asks for"),
    "VizWiz": _PHOTO_QUESTION,
    "GQA": _PHOTO_QUESTION,
    "TextVQA": TaskSlots("a photo with a question about the text in it", "an answer", "what the question asks for"),
    "VisDial": TaskSlots("a dialogue about a photo", "a photo", "the scene that is talked about"),
    "CIRR": TaskSlots("a photo with a change to make", "a changed photo", "the scene after the change"),
    "VisualNews_t2i": TaskSlots("the caption of a news photo", "a news photo", "the event that is reported"),
    "VisualNews_i2t": TaskSlots("a news photo", "the caption of a news photo", "the event that is reported"),
    "MSCOCO_t2i": TaskSlots("the caption of a photo", "a photo", "the scene that is shown"),
    "MSCOCO_i2t": TaskSlots("a photo", "the caption of a photo", "the scene that is shown"),
    "NIGHTS": TaskSlots("an image", "an image that looks like another one", "the look of the image"),
    "WebQA": TaskSlots("a question", "a picture with text from a web page", "what the question asks for"),
    "OVEN": TaskSlots("a photo with a question", "a picture with a text of an encyclopedia", "the thing asked about"),
    "FashionIQ": TaskSlots(
        "a photo of a garment with a change to make", "a photo of a changed garment", "the garment after the change"
    ),
    "EDIS": TaskSlots("a headline", "a news picture with its headline", "the event that is reported"),
    "Wiki-SS-NQ": TaskSlots("a question", "a screenshot of an encyclopedia page", "what the question asks for"),
    "MSCOCO": TaskSlots("a photo with the name of an object", _CROP, "the object that is named"),
    "Visual7W-Pointing": TaskSlots("a photo with a question", _CROP, "the object that is asked for"),
    "RefCOCO": TaskSlots(_EXPRESSION, _CROP, "the object that is meant"),
    "RefCOCO-Matching": TaskSlots(_EXPRESSION, _EXPRESSION, "the object that is meant"),
}
"""The slots of the 36 datasets of MMEB; one of them has another name in the training data, which is listed, too."""

MINI_SLOTS: dict[str, TaskSlots] = {
    "ColorShape": TaskSlots("a picture", "a color and a shape", "the color and the shape of the object"),
    "ShapePlace": TaskSlots("a picture", "a shape and a place", "the shape and the place of the object"),
    "Digits": TaskSlots("a picture of a digit", "a digit", "the digit that is written"),
    "ShapeBackground": TaskSlots("a picture", "a shape and a background", "the shape of the object and the background"),
    "ColorShape-Noisy": TaskSlots("a noisy picture", "a color and a shape", "the color and the shape of the object"),
    "AttributeQA": _MINI_QUESTION,
    "PairQA": _MINI_QUESTION,
    "RelationQA": _MINI_QUESTION,
    "Scenes_t2i": TaskSlots("the caption of a picture", "a picture", "the scene that is shown"),
    "Scenes_i2t": TaskSlots("a picture", "the caption of a picture", "the scene that is shown"),
    "Changed": TaskSlots("a picture with a change to make", "a changed picture", "the scene after the change"),
    "Pairs_t2i": TaskSlots("the caption of a picture", "a picture", "the two objects that are shown"),
    "WebPages": TaskSlots("a caption", "a picture with its caption", "the scene that is told"),
    "Pointing": TaskSlots("a picture with the name of an object", _CROPPED, "the object that is named"),
    "Pointing-Place": TaskSlots("a picture with the name of a side", _CROPPED, "the object on that side"),
    "Pointing-Matching": TaskSlots(_MINI_EXPRESSION, _MINI_EXPRESSION, "the object that is meant"),
}
"""The slots of the datasets of MMEB-mini."""

SLOTS: dict[str, TaskSlots] = {**MMEB_SLOTS, **MINI_SLOTS}
"""The slots of every dataset that is known, by its name; the names of the benchmarks differ."""


def known_slots(dataset: str) -> TaskSlots:
    """Return the slots of a dataset, whose name may be written in any case if only one fits.

    Args:
        dataset: A name in `SLOTS`.

    Raises:
        Gen2EmbedError: There is none of that name; the message names a close one.
    """
    if dataset in SLOTS:
        return SLOTS[dataset]
    folded = {name.casefold(): name for name in SLOTS}
    if dataset.casefold() in folded:
        return SLOTS[folded[dataset.casefold()]]
    close = difflib.get_close_matches(dataset.casefold(), folded, n=1)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    raise Gen2EmbedError(f"no slots are known for the dataset {dataset!r}{hint} Known: {', '.join(SLOTS)}")
