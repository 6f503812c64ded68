r"""From the columns of a row to the text that is encoded: image markers, and V2's separate instructions.

MMEB marks the place of an image with `<|image_1|>`. The marker stays in the text where the row has that image (the
prompt turns it into the family's own) and is dropped where it has none, which happens in the queries of WebQA and
EDIS. Texts keep the newline that they end in.

In V2 the instruction is a column of its own. VLM2Vec's V2 loaders put it together with the text so that the result
is what V1 has in one column, and they do it differently per kind of dataset:

| form                | query                             | candidate                                         |
|---------------------|-----------------------------------|---------------------------------------------------|
| `label`             | `M I T\n`                         | the text alone                                    |
| `question`          | `M\nI T\n`, I stripped            | the text alone                                    |
| `image-to-image`    | `M\nI T\n`, I stripped            | `M I T\n`, or `M I` where the candidates lack text |
| `text-to-image`     | `I T\n`                           | `M I T\n`, or `M I\n`                             |
| `dialogue-to-image` | `I T\n\n`                         | as `text-to-image`                                |

M is the marker, I the instruction without its marker, T the text; a space before a newline disappears. Source: what
VLM2Vec's `main` branch does under `src/data/eval_dataset` (image_cls, image_i2t, image_qa, image_i2i_vg, image_t2i).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gen2embed_mteb.mmeb.datasets import Form

MARKER = "<|image_1|>"

# A marker takes the blank or the line break that parts it from the text along: V1's `<|image_1|>\nFind a …` and V2's
# `Find a …` become the same text.
_NUMBERED_MARKER = re.compile(r"<\|image_(\d+)\|>(?:[ \t]*\n|[ \t])?")


def drop_unmatched_markers(text: str, num_images: int) -> str:
    r"""Remove every `<|image_N|>` for which there is no image.

    Args:
        text: A text of MMEB.
        num_images: How many images the row has on this side.

    Returns:
        The text without the markers numbered above `num_images`, each taken with the space or newline after it.
    """
    return _NUMBERED_MARKER.sub(lambda match: match.group(0) if 1 <= int(match.group(1)) <= num_images else "", text)


def compose_query(form: Form, instruction: str, text: str) -> str:
    r"""Put a V2 query together as V1 has it.

    Args:
        form: The dataset's form.
        instruction: Column `qry_inst`.
        text: Column `qry_text`, possibly empty.

    Returns:
        The text of the query, with its image marker where the form has an image.
    """
    if form in ("text-to-image", "dialogue-to-image"):
        end = "\n\n" if form == "dialogue-to-image" else "\n"
        return f"{instruction} {text}{end}"
    instruction = instruction.replace(MARKER, "")
    if form != "label":
        instruction = "\n" + instruction.strip()
    body = f"{instruction} {text}" if text else instruction
    return _join(body) + "\n"


def compose_candidates(form: Form, instruction: str, texts: Sequence[str]) -> list[str]:
    r"""Put the V2 candidates of one row together as V1 has them.

    Args:
        form: The dataset's form.
        instruction: Column `tgt_inst`; unused where candidates are plain text.
        texts: Column `tgt_text`, one text a candidate.

    Returns:
        One text a candidate. As in VLM2Vec the first candidate decides whether the row's candidates have texts.
    """
    if form in ("label", "question"):
        return list(texts)
    instruction = instruction.replace(MARKER, "")
    if texts and texts[0].strip():
        return [_join(f"{instruction} {text}") + "\n" for text in texts]
    end = "" if form == "image-to-image" else "\n"
    return [_join(instruction) + end] * len(texts)


def _join(body: str) -> str:
    return f"{MARKER} {body}".replace(" \n", "\n")
