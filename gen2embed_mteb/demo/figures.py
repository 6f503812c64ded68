"""The paper's figures in small, for the demo's report: attention, the one word, and the space of vectors.

Cost: a few seconds; one photograph, three rows of datasets, and 40 rows of another under two prompts. The map is of
principal components, since UMAP is not installed with this package.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.analysis.attention import picture as attention_picture
from gen2embed_mteb.analysis.attention.run import analyze_attention, open_attention
from gen2embed_mteb.analysis.options import AttentionOptions, SpaceOptions, WordsOptions
from gen2embed_mteb.analysis.space import picture as space_picture
from gen2embed_mteb.analysis.space.run import analyze_space, open_rows
from gen2embed_mteb.analysis.words import picture as words_picture
from gen2embed_mteb.analysis.words.run import analyze_words, open_words
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.mini.benchmark import MMEB_MINI

ROWS = 40
SPACE_OF = ("Scenes_i2t",)


class Figure(NamedTuple):
    """A figure of the report.

    Attributes:
        title: What it is about.
        text: What to see in it.
        svg: The drawing.
    """

    title: str
    text: str
    svg: str


def figures(model: Gen2Embed, data_dir: Path, name: str, limit: int | None = None) -> list[Figure]:
    """Return the three figures.

    Args:
        model: The model, with the prompt whose attention is shown; it has the same prompt afterwards.
        data_dir: The root of MMEB-mini.
        name: The model's name.
        limit: The most rows of a dataset.
    """
    prompt = model.prompt_mode
    asked = AttentionOptions()
    attention = replace(analyze_attention(model, asked, open_attention(asked)), model=name)
    of_mini: dict[str, Any] = {"benchmark": MMEB_MINI.name, "data_dir": str(data_dir)}
    wanted = WordsOptions(**of_mini, limit=1)
    words = replace(analyze_words(model, wanted, open_words(wanted)), model=name)
    options = SpaceOptions(
        **of_mini,
        subsets=SPACE_OF,
        limit=min(limit or ROWS, ROWS),
        prompts=("none", "hierarchical"),
        projection="pca",
        max_error_rate=1.0,
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        space = replace(analyze_space(model, options, Path(folder), *open_rows(options)), model=name)
    model.set_prompt(prompt)
    return [
        Figure(
            "Which word is meant",
            "The embedding is the state from which the model would write its next word. Without a prompt that word "
            "begins a sentence; with the prompt it names what is shown.",
            words_picture.picture(words).svg(inline=True),
        ),
        Figure(
            "Queries and candidates as points",
            "Lines join a query and its positive. The map shows two directions of many; the numbers below are of the "
            "whole vectors.",
            space_picture.picture(space).svg(inline=True),
        ),
        Figure(
            "Where the attention goes",
            "Eq. 1 of the paper gives early tokens much and late ones little even if attention is uniform (dashed), "
            "since few rows see the late ones. So it stands beside its uniform value, and beside the last row, of "
            "which the embedding is made.",
            attention_picture.picture(attention).svg(inline=True),
        ),
    ]
