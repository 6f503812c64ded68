"""Building HTML reports: one file that contains everything, images included, light or dark as the system is.

A page fetches nothing and runs no script, and all text from the data is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable

from PIL import Image

from gen2embed_mteb.evaluation.tables import Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #8882; --none: #9a9a9a; --ours: #3b7de0; --good: #1a9850; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td:first-child, th:first-child { padding-left: 0; text-align: left; }
td:not(:first-child), th:not(:first-child) { text-align: right; }
.left td, .left th { text-align: left !important; }
img { max-width: 100%; border-radius: 3px; }
@media (max-width: 40rem) { td, th { padding: .2rem .3rem; font-size: .75rem; } th { overflow-wrap: anywhere; } }
"""
"""The styles of all pages; each page may add its own."""

_MARKER = re.compile(r"<\|image_\d+\|>")


def page_bytes(title: str, style: str, parts: Iterable[str]) -> bytes:
    """Return an HTML page.

    Args:
        title: The title.
        style: Styles of this page alone.
        parts: The body, as HTML.
    """
    head = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    return "\n".join([head, *parts, "</html>\n"]).encode()


def table(rows: Table, kind: str = "") -> str:
    """Return a table as HTML; the first row is the header, `kind` is a CSS class."""

    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(cells, "td") for cells in rows[1:])
    return f"<div class='scroll'><table class='{kind}'>{line(rows[0], 'th')}{body}</table></div>"


def plain(text: str, longest: int = 400) -> str:
    """Return escaped text without image markers, cut if it is longer than `longest` characters."""
    shown = _MARKER.sub("", text).strip()
    return html.escape(shown if len(shown) <= longest else shown[: longest - 1].rstrip() + "…")


def picture(image: Image.Image, alt: str, longest: int = 320) -> str:
    """Return an image as HTML with its data inside; its longer side is reduced to at most `longest` pixels."""
    buffer = io.BytesIO()
    small = max(image.size) <= 64
    shown = image.copy()
    shown.thumbnail((longest, longest))
    shown.save(buffer, "PNG" if small else "JPEG")
    data = base64.b64encode(buffer.getvalue()).decode()
    # The page enlarges a tiny image; its pixels should stay squares.
    kind = " class='tiny'" if small else ""
    return f"<img{kind} alt='{html.escape(alt)}' src='data:image/{'png' if small else 'jpeg'};base64,{data}'>"
