"""The demo's report: one HTML file with everything inside, pictures included. It opens offline and asks for nothing."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gen2embed_mteb.store import write_atomic

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --none: #9a9a9a; --ours: #2a6fdb; --good: #1a9850; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
td:not(:first-child), th:not(:first-child) { text-align: right; } .left td { text-align: left !important; }
.bars { display: grid; grid-template-columns: 11rem 1fr; gap: .35rem .8rem; align-items: center; }
.bar { height: .7rem; border-radius: 2px; min-width: 1px; } .pair { display: grid; gap: 2px; }
.row { display: flex; align-items: center; gap: .3rem; font-size: .8rem; }
.none { background: var(--none); } .hierarchical { background: var(--ours); }
.query { display: flex; gap: 1rem; margin: 1.2rem 0 .3rem; align-items: center; }
.cards { display: flex; gap: .5rem; flex-wrap: wrap; margin: .3rem 0; align-items: stretch; }
.card { border: 2px solid var(--line); border-radius: 6px; padding: .3rem; width: 6.6rem; font-size: .75rem; }
.card.right { border-color: var(--good); }
.card img, .query img { width: 64px; height: 64px; image-rendering: pixelated; }
.mode { width: 6.5rem; font-size: .8rem; align-self: center; } .photo img { height: 7rem; }
"""


@dataclass(frozen=True)
class Neighbours:
    """One query and its nearest candidates under one prompt.

    Attributes:
        dataset: where the row is from.
        text: the query's text.
        image: its image, if it has one.
        candidates: (text, image, similarity, is the positive), nearest first.
    """

    dataset: str
    text: str
    image: Image.Image | None
    candidates: tuple[tuple[str, Image.Image | None, float, bool], ...]


@dataclass(frozen=True)
class DemoResult:
    """What the page shows.

    Attributes:
        table: figures in percent, ours beside the paper's; the first row is the header.
        scores: by prompt mode, P@1 in [0, 1] of every dataset.
        photos: the photographs by name.
        similarities: (photo, caption, similarity by mode).
        neighbours: by prompt mode, the shown rows.
    """

    table: list[list[str]]
    scores: dict[str, dict[str, float]]
    photos: dict[str, Image.Image]
    similarities: list[tuple[str, str, dict[str, float]]]
    neighbours: dict[str, list[Neighbours]]


def write_page(demo: DemoResult, path: Path) -> Path:
    """Write the report atomically and return its path."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Gen2Embed: the demo's report</title><style>{_STYLE}</style>",
        "<h1>A generator as an embedder, by prompt alone</h1>",
        "<p>One model, trained only to predict the next token (<code>gen2embed-mini</code>), on one benchmark "
        "(MMEB-mini), twice: <b>none</b>, its inputs as they are, and <b>hierarchical</b>, with the two-level prompt. "
        "Precision@1 in percent; the paper's rows are Qwen2-VL-2B on MMEB.</p>",
        _table(demo.table),
        "<h2>By dataset</h2>",
        _bars(demo.scores),
        "<h2>Real photographs and captions</h2>",
        _photos(demo),
        "<h2>Nearest candidates</h2><p>Green is the right one; the number is the similarity.</p>",
        *(_rows(demo.neighbours, index) for index in range(len(next(iter(demo.neighbours.values()))))),
        "</html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(parts).encode())
    return path


def _table(rows: list[list[str]], kind: str = "") -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(cells, "td") for cells in rows[1:])
    return f"<table class='{kind}'>{line(rows[0], 'th')}{body}</table>"


def _bars(scores: dict[str, dict[str, float]]) -> str:
    lines = []
    for name in next(iter(scores.values())):
        pair = "".join(
            f"<div class='row'><div class='bar {mode}' style='width:{80 * values[name]:.1f}%'></div>"
            f"{100 * values[name]:.1f}</div>"
            for mode, values in scores.items()
        )
        lines.append(f"<div>{html.escape(name)}</div><div class='pair'>{pair}</div>")
    legend = " ".join(f"<span class='{mode}' style='padding:0 .6rem'>&nbsp;</span> {mode}" for mode in scores)
    return f"<p>{legend}</p><div class='bars'>{''.join(lines)}</div>"


def _photos(demo: DemoResult) -> str:
    pictures = "".join(_image(photo, name) for name, photo in demo.photos.items())
    modes = list(demo.scores)
    rows = [[name, caption, *(f"{values[mode]:.3f}" for mode in modes)] for name, caption, values in demo.similarities]
    return f"<p class='photo'>{pictures}</p>" + _table([["photo", "caption", *modes], *rows], "left")


def _rows(neighbours: dict[str, list[Neighbours]], index: int) -> str:
    first = next(iter(neighbours.values()))[index]
    image = "" if first.image is None else _image(first.image, "query")
    parts = [f"<div class='query'>{image}<div><b>{html.escape(first.dataset)}</b> {_text(first.text)}</div></div>"]
    for mode, rows in neighbours.items():
        cards = "".join(
            f"<div class='card{' right' if right else ''}'>{'' if picture is None else _image(picture, 'candidate')}"
            f"<div>{_text(text) if picture is None else ''}</div>{similarity:.3f}</div>"
            for text, picture, similarity, right in rows[index].candidates
        )
        parts.append(f"<div class='cards'><div class='mode'>{mode}</div>{cards}</div>")
    return "".join(parts)


def _text(text: str) -> str:
    """Text for people: without image markers."""
    return html.escape(re.sub(r"<\|image_\d\|>", "", text).strip())


def _image(image: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    shown = image if max(image.size) <= 320 else image.resize((320, round(320 * image.height / image.width)))
    shown.save(buffer, "PNG" if max(image.size) <= 64 else "JPEG")
    kind = "png" if max(image.size) <= 64 else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(alt)}' src='data:image/{kind};base64,{data}'>"
