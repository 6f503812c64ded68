r"""Composing the text to encode from the columns of a row: image markers, and the separate instructions of V2.

MMEB marks the place of an image with `<|image_1|>`. The marker stays in the text if the row has that image (the prompt
replaces it by the family's own marker), and is dropped if the row has none, as in the queries of WebQA and EDIS. Texts
keep the newline at their end.

In V2 the instruction is a separate column. VLM2Vec's V2 loaders join it with the text so that the result equals the
single column of V1, and they join it differently per kind of dataset:

| form                | query                             | candidate                                         |
|---------------------|-----------------------------------|---------------------------------------------------|
| `label`             | `M I T\n`                         | the text alone                                    |
| `question`          | `M\nI T\n`, I stripped            | the text alone                                    |
| `image-to-image`    | `M\nI T\n`, I stripped            | `M I T\n`, or `M I` where the candidates lack text |
| `text-to-image`     | `I T\n`                           | `M I T\n`, or `M I\n`                             |
| `dialogue-to-image` | `I T\n\n`                         | as `text-to-image`                                |

M is the marker, I the instruction without its marker, T the text; a space before a newline is removed. Source: the code
of VLM2Vec's branch `main` in `src/data/eval_dataset` (image_cls, image_i2t, image_qa, image_i2i_vg, image_t2i).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gen2embed_mteb.mmeb.datasets import Form

MARKER = "<|image_1|>"

# A marker is removed together with the blank or line break between it and the text: then V1's `<|image_1|>\nFind a …`
# and V2's `Find a …` become the same text.
_NUMBERED_MARKER = re.compile(r"<\|image_(\d+)\|>(?:[ \t]*\n|[ \t])?")


def drop_unmatched_markers(text: str, num_images: int) -> str:
    r"""Remove every `<|image_N|>` for which there is no image.

    Args:
        text: A text of MMEB.
        num_images: The number of images that the row has on this side.

    Returns:
        The text without the markers numbered above `num_images`, and without the space or newline after each.
    """
    return _NUMBERED_MARKER.sub(lambda match: match.group(0) if 1 <= int(match.group(1)) <= num_images else "", text)


def compose_query(form: Form, instruction: str, text: str) -> str:
    r"""Compose a V2 query so that it equals the query in V1.

    Args:
        form: The dataset's form.
        instruction: Column `qry_inst`.
        text: Column `qry_text`, possibly empty.

    Returns:
        The text of the query, with its image marker if the form has an image.
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
    r"""Compose the V2 candidates of one row so that they equal the candidates in V1.

    Args:
        form: The dataset's form.
        instruction: Column `tgt_inst`; unused if candidates are plain text.
        texts: Column `tgt_text`, one text per candidate.

    Returns:
        One text per candidate. As in VLM2Vec, the first candidate decides whether the row's candidates have texts.
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
