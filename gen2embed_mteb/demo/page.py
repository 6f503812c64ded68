"""The demo's report: one HTML file that contains everything, images included, and can be opened offline."""

from __future__ import annotations

import html
from dataclasses import dataclass

from PIL import Image

from gen2embed_mteb.demo.figures import Figure
from gen2embed_mteb.evaluation import pages

_STYLE = """
.bars { display: grid; grid-template-columns: 11rem 1fr; gap: .7rem .8rem; align-items: center; }
.bar { height: .7rem; border-radius: 2px; min-width: 1px; } .pair { display: grid; gap: 2px; }
.row { display: flex; align-items: center; gap: .3rem; font-size: .8rem; }
.model-0 { background: var(--none); } .model-1 { background: var(--ours); } .model-2 { background: var(--good); }
.query { display: flex; gap: 1rem; margin: 1.2rem 0 .3rem; align-items: center; }
.cards { display: flex; gap: .5rem; flex-wrap: wrap; margin: .3rem 0; align-items: stretch; }
.card { border: 2px solid var(--line); border-radius: 6px; padding: .3rem; width: 6.6rem; font-size: .75rem; }
.card.right { border-color: var(--good); }
.card img, .query img { width: 64px; height: 64px; image-rendering: pixelated; }
.mode { width: 6.5rem; font-size: .8rem; align-self: center; }
.photo { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: center; margin: 1rem 0; }
.photo img { width: 15rem; }
.drawing svg { max-width: 100%; height: auto; border-radius: 6px; display: block; }
@media (max-width: 40rem) { .bars { grid-template-columns: 8.5rem 1fr; } .mode { width: 100%; } }
"""


@dataclass(frozen=True)
class Neighbours:
    """One query and its nearest candidates by one model under one prompt.

    Attributes:
        dataset: The dataset of the row.
        text: The query's text.
        image: Its image, if it has one.
        candidates: (text, image, similarity, is the positive), nearest first.
    """

    dataset: str
    text: str
    image: Image.Image | None
    candidates: tuple[tuple[str, Image.Image | None, float, bool], ...]


@dataclass(frozen=True)
class DemoResult:
    """The content of the page.

    Attributes:
        table: Figures in percent, ours beside the paper's; the first row is the header.
        scores: P@1 in [0, 1] of every dataset, by model.
        photos: The photographs by name.
        similarities: (photo, caption, similarity by model).
        neighbours: The shown rows, by model.
        gain: A sentence about the gain by fine-tuning; empty without fine-tuning.
        clusters: The path, relative to this page, of a page about the training data; empty without fine-tuning.
        figures: What the analyses draw.

    The name of a model is its prompt, and the kind of training if it was trained.
    """

    table: list[list[str]]
    scores: dict[str, dict[str, float]]
    photos: dict[str, Image.Image]
    similarities: list[tuple[str, str, dict[str, float]]]
    neighbours: dict[str, list[Neighbours]]
    gain: str = ""
    clusters: str = ""
    figures: tuple[Figure, ...] = ()


def page_bytes(demo: DemoResult) -> bytes:
    """Return the report."""
    tuned = (
        " Then it is fine-tuned for a minute, on hard negatives that it chose itself (SaHa), and evaluated with the "
        "same prompt."
    )
    link = f"<a href='{html.escape(demo.clusters)}'>Some of the clusters it was trained on</a>, with pictures."
    parts = [
        f"<h1>A generator as an embedder, by prompt alone{', then fine-tuned' if demo.gain else ''}</h1>",
        "<p>One model, trained only to predict the next token (<code>gen2embed-mini</code>), on one benchmark "
        "(MMEB-mini), twice: <b>none</b>, its inputs as they are, and <b>hierarchical</b>, with the two-level prompt."
        f"{tuned if demo.gain else ''} Precision@1 in percent; the paper's rows are Qwen2-VL-2B on MMEB.</p>",
        pages.table(demo.table),
        f"<p><b>{html.escape(demo.gain)}.</b> {link}</p>" if demo.gain else "",
        "<h2>By dataset</h2>",
        _bars(demo.scores),
        "<h2>Real photographs and captions</h2>",
        _photos(demo),
        "<h2>Nearest candidates</h2><p>Green is the right one; the number is the similarity.</p>",
        *(_rows(demo.neighbours, index) for index in range(len(next(iter(demo.neighbours.values()))))),
        *(_figure(figure) for figure in demo.figures),
    ]
    return pages.page_bytes("Gen2Embed: the demo's report", _STYLE, parts)


def _figure(figure: Figure) -> str:
    words = f"<h2>{html.escape(figure.title)}</h2><p>{html.escape(figure.text)}</p>"
    return f"{words}<div class='drawing'>{figure.svg}</div>"


def _bars(scores: dict[str, dict[str, float]]) -> str:
    lines = []
    for name in next(iter(scores.values())):
        bars = "".join(
            f"<div class='row'><div class='bar model-{number}' style='width:{80 * values[name]:.1f}%'></div>"
            f"{100 * values[name]:.1f}</div>"
            for number, values in enumerate(scores.values())
        )
        lines.append(f"<div>{html.escape(name)}</div><div class='pair'>{bars}</div>")
    legend = " ".join(
        f"<span class='model-{number}' style='padding:0 .6rem'>&nbsp;</span> {html.escape(model)}"
        for number, model in enumerate(scores)
    )
    return f"<p>{legend}</p><div class='bars'>{''.join(lines)}</div>"


def _photos(demo: DemoResult) -> str:
    models = list(demo.scores)
    figures = []
    for name, photo in demo.photos.items():
        rows = [(caption, values) for shown, caption, values in demo.similarities if shown == name]
        cells = [[caption, *(f"{values[model]:.3f}" for model in models)] for caption, values in rows]
        table = pages.table([["caption", *models], *cells])
        figures.append(f"<div class='photo'>{pages.picture(photo, name)}{table}</div>")
    return "<p>Similarity of a photograph, as the query, to each caption.</p>" + "".join(figures)


def _rows(neighbours: dict[str, list[Neighbours]], index: int) -> str:
    first = next(iter(neighbours.values()))[index]
    image = "" if first.image is None else pages.picture(first.image, "query")
    text = f"<b>{html.escape(first.dataset)}</b> {pages.plain(first.text)}"
    parts = [f"<div class='query'>{image}<div>{text}</div></div>"]
    for model, rows in neighbours.items():
        cards = "".join(_card(*candidate) for candidate in rows[index].candidates)
        parts.append(f"<div class='cards'><div class='mode'>{html.escape(model)}</div>{cards}</div>")
    return "".join(parts)


def _card(text: str, image: Image.Image | None, similarity: float, right: bool) -> str:
    shown = pages.plain(text) if image is None else pages.picture(image, "candidate")
    return f"<div class='card{' right' if right else ''}'><div>{shown}</div>{similarity:.3f}</div>"
