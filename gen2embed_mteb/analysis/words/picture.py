"""The picture of `analyze words`: a row for each input, with its image, and bars of probabilities for each prompt."""

from __future__ import annotations

from typing import Any

from PIL import Image

from gen2embed_mteb.analysis.drawing.canvas import FAINT, SOFT, Canvas, shortened
from gen2embed_mteb.analysis.drawing.colors import BLUE, ORANGE
from gen2embed_mteb.analysis.inputs import AskedInput
from gen2embed_mteb.analysis.words.run import NextToken, WordsResult, shown

_MARGIN, _LEFT, _COLUMN, _LINE, _THUMB, _HEAD = 40, 300, 330, 19, 84, 118
_WORD = 128
"""The width of a token's text."""


def picture(result: WordsResult) -> Canvas:
    """Draw the tokens of every input.

    Args:
        result: What was asked.
    """
    lines = max((len(tokens) for columns in result.tokens for tokens in columns), default=1)
    row = max(_THUMB + 26, lines * _LINE + 26)
    width = 2 * _MARGIN + _LEFT + len(result.prompts) * _COLUMN
    canvas = Canvas(width, _HEAD + row * len(result.inputs) + 8, f"The one word of {result.model} by prompt")
    canvas.text(_MARGIN, 42, "The one word", size=20, bold=True)
    about = f"{result.model}: the most probable next tokens at the embedding's position; · is a blank"
    canvas.text(_MARGIN, 64, shortened(about, width - 2 * _MARGIN, 12), color=SOFT)
    for number, prompt in enumerate(result.prompts):
        canvas.text(_MARGIN + _LEFT + number * _COLUMN + _WORD, _HEAD - 14, prompt, size=14, bold=True)
    for number, (one, columns) in enumerate(zip(result.inputs, result.tokens, strict=True)):
        top = _HEAD + number * row
        canvas.line([(_MARGIN, top), (width - _MARGIN, top)], FAINT)
        _input(canvas, one, top + 13)
        for place, tokens in enumerate(columns):
            _bars(canvas, tokens, one, _MARGIN + _LEFT + place * _COLUMN, top + 10)
    return canvas


def _input(canvas: Canvas, one: AskedInput, top: float) -> None:
    x, image = _MARGIN, _first(one.given.get("image"))
    if image is not None:
        small = image.copy()
        if max(image.size) > 2 * _THUMB:
            small.thumbnail((2 * _THUMB, 2 * _THUMB))
        scale = _THUMB / max(image.size)
        canvas.image(x, top, image.width * scale, image.height * scale, small, pixelated=max(image.size) <= _THUMB)
        x += _THUMB + 14
    room = _MARGIN + _LEFT - 22 - x
    canvas.text(x, top + 10, f"{one.label}, {one.side}".removeprefix(", "), size=11, color=SOFT)
    for number, line in enumerate(wrapped(one.text, room, 12, 4)):
        canvas.text(x, top + 28 + 16 * number, line, size=12)


def _bars(canvas: Canvas, tokens: tuple[NextToken, ...], one: AskedInput, x: float, top: float) -> None:
    color = BLUE if one.side == "query" else ORANGE
    most = _COLUMN - _WORD - 74
    for number, token in enumerate(tokens):
        y = top + number * _LINE
        canvas.text(x + _WORD - 8, y + 13, shortened(shown(token.text), _WORD - 10, 12), size=12, anchor="end")
        canvas.rectangle(x + _WORD, y + 3, max(1.0, most * token.probability), 12, color, radius=2)
        label = f"{100 * token.probability:.1f} %" if token.probability >= 0.0005 else "< 0.1 %"
        canvas.text(x + _WORD + most * token.probability + 6, y + 13, label, size=10, color=SOFT)


def _first(image: Any) -> Image.Image | None:
    found: Image.Image | None = image[0] if isinstance(image, list) else image
    return found


def wrapped(text: str, width: float, size: float, most: int) -> list[str]:
    """Return a text cut into lines that fit into a width; the last one ends in dots if the text goes on.

    Args:
        text: The text.
        width: The width of a line.
        size: That of the letters.
        most: The most lines.
    """
    words, lines = text.split(), list[str]()
    while words and len(lines) < most:
        if len(lines) == most - 1:
            return [*lines, shortened(" ".join(words), width, size)]
        count = 1
        while count < len(words) and shortened(line := " ".join(words[: count + 1]), width, size) == line:
            count += 1
        lines.append(shortened(" ".join(words[:count]), width, size))
        words = words[count:]
    return lines
