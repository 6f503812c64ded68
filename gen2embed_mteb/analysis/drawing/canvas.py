r"""`Canvas`: shapes that are drawn once and written twice, as SVG text and as PNG pixels.

The PNG is drawn by Pillow at four times the size and reduced to twice the size, so that edges are smooth. Pillow's own
font has Latin letters; other characters are written as `\uXXXX` there. The SVG leaves them to the fonts of its viewer.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from PIL import Image, ImageColor, ImageDraw, ImageFont

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]

INK, SOFT, FAINT, PAPER = "#1d2330", "#667085", "#d5dae3", "#ffffff"
"""The colors of text, of text beside it, of rules, and of the ground."""
NAME_SPACE = ' xmlns="http://www.w3.org/2000/svg"'
PNG_SCALE, _SMOOTHING = 2, 2
_PLAIN = {0x2013: "-", 0x2014: "-", 0xA0: " "}
_DENSE = PNG_SCALE * _SMOOTHING


@dataclass
class Canvas:
    """A drawing; lengths are in pixels of the SVG, from the upper left corner.

    Attributes:
        width: Its width.
        height: Its height.
        title: What it shows, for readers who cannot see it.
    """

    width: int
    height: int
    title: str = ""
    _svg: list[str] = field(default_factory=list)
    _paint: list[Callable[[Image.Image], None]] = field(default_factory=list)

    def rectangle(
        self, x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0, opacity: float = 1
    ) -> None:
        """Draw a filled rectangle."""
        rounded = f' rx="{_n(radius)}"' if radius else ""
        self._svg.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"{rounded} fill="{fill}"'
            f"{_opacity('fill', opacity)}/>"
        )
        # Pillow counts the last pixel in.
        box = (_DENSE * x, _DENSE * y, max(_DENSE * x, _DENSE * (x + width) - 1))
        lower = max(_DENSE * y, _DENSE * (y + height) - 1)
        color = _rgba(fill, opacity)
        self._paint.append(
            lambda image: (
                _draw(image).rounded_rectangle((*box, lower), _DENSE * radius, color)
                if radius
                else _draw(image).rectangle((*box, lower), color)
            )
        )

    def line(
        self, points: Sequence[Point], color: str, *, width: float = 1, opacity: float = 1, dash: float = 0
    ) -> None:
        """Draw a line through points; `dash` is the length of its dashes, 0 for none."""
        shown = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        dashed = f' stroke-dasharray="{_n(dash)}"' if dash else ""
        self._svg.append(
            f'<polyline points="{shown}" fill="none" stroke="{color}" stroke-width="{_n(width)}"'
            f' stroke-linejoin="round" stroke-linecap="round"{dashed}{_opacity("stroke", opacity)}/>'
        )
        parts = _dashes(points, dash) if dash else [list(points)]
        dense = [[(_DENSE * x, _DENSE * y) for x, y in part] for part in parts]
        color_, thick = _rgba(color, opacity), max(1, round(_DENSE * width))

        def paint(image: Image.Image) -> None:
            drawing = _draw(image)
            for part in dense:
                drawing.line(part, color_, thick, joint="curve")

        self._paint.append(paint)

    def circle(
        self, x: float, y: float, radius: float, fill: str, *, opacity: float = 1, outline: str = "", thick: float = 1
    ) -> None:
        """Draw a filled circle, with an outline if it has a color."""
        edge = f' stroke="{outline}" stroke-width="{_n(thick)}"' if outline else ""
        self._svg.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}"{edge}{_opacity("fill", opacity)}/>'
        )
        reach = _DENSE * (radius + (thick / 2 if outline else 0))
        box = (_DENSE * x - reach, _DENSE * y - reach, _DENSE * x + reach, _DENSE * y + reach)
        color, border = _rgba(fill, opacity), outline or None
        self._paint.append(
            lambda image: _draw(image).ellipse(box, color, border, max(1, round(_DENSE * thick)) if border else 0)
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        color: str = INK,
        anchor: Anchor = "start",
        bold: bool = False,
        upward: bool = False,
    ) -> None:
        """Write a line of text; (x, y) is on its baseline. `upward` turns it by a quarter, to be read from below."""
        weight = ' font-weight="600"' if bold else ""
        turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if upward else ""
        # A viewer would join several blanks, and drop those at the ends.
        self._svg.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{color}" text-anchor="{anchor}"'
            f' xml:space="preserve"{weight}{turn}>{html.escape(_without_controls(text))}</text>'
        )
        where = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        shown, font = _latin(_without_controls(text)), _font(_DENSE * size)
        stroke: dict[str, Any] = {"stroke_width": round(0.02 * _DENSE * size), "stroke_fill": color} if bold else {}

        def paint(image: Image.Image) -> None:
            if not upward:
                _draw(image).text((_DENSE * x, _DENSE * y), shown, color, font, where, **stroke)
                return
            turned = image.rotate(-90, expand=True)
            spot = (image.height - _DENSE * y, _DENSE * x)
            _draw(turned).text(spot, shown, color, font, where, **stroke)
            image.paste(turned.rotate(90, expand=True))

        self._paint.append(paint)

    def image(
        self, x: float, y: float, width: float, height: float, picture: Image.Image, *, pixelated: bool = False
    ) -> None:
        """Draw a picture into a rectangle; `pixelated` keeps the edges of its pixels."""
        data = io.BytesIO()
        picture.save(data, "PNG")
        style = ' style="image-rendering:pixelated"' if pixelated else ""
        self._svg.append(
            f'<image x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" preserveAspectRatio="none"'
            f'{style} href="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"/>'
        )
        size = max(1, round(_DENSE * width)), max(1, round(_DENSE * height))
        kind = Image.Resampling.NEAREST if pixelated else Image.Resampling.LANCZOS
        place = round(_DENSE * x), round(_DENSE * y)

        def paint(image: Image.Image) -> None:
            scaled = picture.convert("RGBA").resize(size, kind)
            image.paste(scaled, place, scaled)

        self._paint.append(paint)

    def svg(self, *, inline: bool = False) -> str:
        """Return the drawing as SVG; `inline` leaves out the name space, which a page of HTML has no need of."""
        label = f"<title>{html.escape(self.title)}</title>" if self.title else ""
        head = (
            f'<svg{"" if inline else NAME_SPACE} viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
            f' height="{self.height}" font-family="system-ui, Helvetica, Arial, sans-serif" role="img">{label}'
            f'<rect width="{self.width}" height="{self.height}" fill="{PAPER}"/>'
        )
        return "\n".join([head, *self._svg, "</svg>\n"])

    def svg_bytes(self) -> bytes:
        """Return the drawing as the bytes of an SVG file."""
        return self.svg().encode("utf-8", "backslashreplace")

    def png_bytes(self) -> bytes:
        """Return the drawing as the bytes of a PNG file, at twice the size."""
        image = Image.new("RGB", (_DENSE * self.width, _DENSE * self.height), PAPER)
        for paint in self._paint:
            paint(image)
        data = io.BytesIO()
        image.reduce(_SMOOTHING).save(data, "PNG", optimize=True)
        return data.getvalue()


def text_width(text: str, size: float = 12) -> float:
    """Return the width of a line of text, as Pillow's own font has it; a viewer's font differs a little."""
    return float(_font(_DENSE * size).getlength(_latin(text))) / _DENSE


def shortened(text: str, width: float, size: float = 12) -> str:
    """Return a text on one line, cut so that it fits into a width."""
    shown = " ".join(text.split())
    if text_width(shown, size) <= width:
        return shown
    low, high = 0, len(shown)
    while low < high:
        middle = (low + high + 1) // 2
        if text_width(f"{shown[:middle].rstrip()}…", size) <= width:
            low = middle
        else:
            high = middle - 1
    return f"{shown[:low].rstrip()}…"


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _opacity(kind: str, opacity: float) -> str:
    return f' {kind}-opacity="{_n(opacity)}"' if opacity < 1 else ""


def _rgba(color: str, opacity: float) -> tuple[int, int, int, int]:
    red, green, blue = ImageColor.getrgb(color)[:3]
    return red, green, blue, round(255 * opacity)


def _draw(image: Image.Image) -> ImageDraw.ImageDraw:
    """Return what draws on an image, and mixes colors that can be seen through with what is there."""
    return ImageDraw.Draw(image, "RGBA")


@cache
def _font(size: float) -> Any:
    return ImageFont.load_default(size)


@cache
def _has_glyph(character: str) -> bool:
    font = _font(24)
    return bytes(font.getmask(character)) != bytes(font.getmask("\U000f0000"))


def _latin(text: str) -> str:
    """Return a text whose characters Pillow's own font has: letters without marks, and others by their number."""
    shown = []
    for one in text.translate(_PLAIN):
        plain = unicodedata.normalize("NFKD", one)[:1]
        known = next((letter for letter in (one, plain) if letter == " " or _has_glyph(letter)), None)
        shown.append(one.encode("ascii", "backslashreplace").decode() if known is None else known)
    return "".join(shown)


def _without_controls(text: str) -> str:
    """Return a text without control characters, which XML forbids, and without lone surrogates."""
    return "".join(
        one if one.isprintable() or one == " " else one.encode("unicode_escape").decode("ascii") for one in text
    )


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """Return the pieces of a line that its dashes cover; dashes and gaps are equally long."""
    pieces: list[list[Point]] = []
    covered, piece = 0.0, [points[0]]
    drawn = True
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        distance = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        at = 0.0
        while distance - at > length - covered:
            at += length - covered
            spot = (x0 + (x1 - x0) * at / distance, y0 + (y1 - y0) * at / distance)
            if drawn:
                pieces.append([*piece, spot])
            drawn, piece, covered = not drawn, [spot], 0.0
        covered += distance - at
        piece.append((x1, y1))
    if drawn and len(piece) > 1:
        pieces.append(piece)
    return pieces
