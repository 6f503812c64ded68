"""Measures inputs with the prompt's words in three places, and writes figures and picture.

The words of the system prompt stand in the system turn, then at the beginning of the user's turn, then at its end. From
the first to the second the role changes and the position hardly does; from the second to the third the position alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gen2embed_mteb.analysis.attention.figures import SegmentFigures, averaged, figures_of
from gen2embed_mteb.analysis.attention.measure import LayerAttention, measure
from gen2embed_mteb.analysis.attention.segments import Mask, Placed, by_position, by_words, places
from gen2embed_mteb.analysis.inputs import AskedInput, OpenedData, open_data, opened_rows, own_input
from gen2embed_mteb.analysis.options import AttentionOptions
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.run import RowError, refuse_images
from gen2embed_mteb.evaluation.tables import Table, as_text
from gen2embed_mteb.mmeb.evaluate import images_in
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.embedder.preparation.inputs import Content

EXAMPLE = "What kind of building is this?"
PHOTO = "china.jpg"
"""The photograph of the built-in example, of scikit-learn's data."""
LEGEND = (
    "ε: Eq. 1; ε/u: divided by its value under uniform attention; last: share of the last row's attention in percent; "
    "last*: the same without token 0"
)


class Measured(NamedTuple):
    """One input with the prompt's words in one place.

    Attributes:
        place: The place; empty if the prompt has no system words.
        num_tokens: Its number of tokens.
        segments: The paper's segments.
        words: The prompt's words, the image and the rest; empty if the prompt has no system words.
        layers: The attention of every layer.
    """

    place: str
    num_tokens: int
    segments: dict[str, Mask]
    words: dict[str, Mask]
    layers: list[LayerAttention]


@dataclass(frozen=True)
class AttentionResult:
    """What was measured.

    Attributes:
        model: The model's name.
        prompt_mode: The name of the prompt.
        system: The words that were moved; empty if the prompt has none in a turn of their own.
        inputs: What each input is, for people.
        measured: For each input, itself with the words in each place.
        errors: Rows that were set aside.
    """

    model: str
    prompt_mode: str
    system: str
    inputs: tuple[str, ...]
    measured: tuple[tuple[Measured, ...], ...]
    errors: tuple[RowError, ...] = ()

    @property
    def place_names(self) -> tuple[str, ...]:
        """The places of the words."""
        return tuple(one.place for one in self.measured[0])

    def layers(self, place: int = 0, *, words: bool = False) -> dict[int, dict[str, SegmentFigures]]:
        """Return the figures by layer and segment, averaged over the inputs.

        Args:
            place: The number of the place of the words.
            words: Whether the segments are those of the words, rather than the paper's.
        """
        found: dict[int, list[dict[str, SegmentFigures]]] = {}
        for one in (of_input[place] for of_input in self.measured):
            for layer in one.layers:
                segments = one.words if words else one.segments
                found.setdefault(layer.layer, []).append(figures_of(layer, segments))
        return {number: averaged(figures) for number, figures in found.items()}

    def overall(self, place: int = 0, *, words: bool = False) -> dict[str, SegmentFigures]:
        """Return the same, averaged over the layers."""
        return averaged(list(self.layers(place, words=words).values()))


def open_attention(options: AttentionOptions) -> OpenedData | AskedInput:
    """Open the datasets, the input of the caller, or the built-in example.

    Args:
        options: Which inputs.

    Raises:
        Gen2EmbedError: Data or the image cannot be used.
    """
    if options.subsets:
        return open_data(options)
    if options.text or options.image:
        label = " ".join(filter(None, (Path(options.image).name if options.image else "", options.text)))
        return AskedInput(label, options.side, own_input(options.text, options.image))
    return AskedInput("", options.side, {"text": EXAMPLE})


def analyze_attention(model: Gen2Embed, options: AttentionOptions, data: OpenedData | AskedInput) -> AttentionResult:
    """Measure the attention of one or several inputs.

    Args:
        model: The model, with its prompt.
        options: Which inputs.
        data: What `open_attention` returned.

    Raises:
        Gen2EmbedError: An input is too long, a dataset or an image cannot be used, or the model shows no attention.
    """
    errors: list[RowError] = []
    inputs = _inputs(model, options, data, errors)
    if not inputs:
        raise Gen2EmbedError(f"no row can be used; the first reason: {errors[0].reason}")
    measured = tuple(_measured(model, model.fitted([one.given])[0], one.side, options.max_tokens) for one in inputs)
    return AttentionResult(
        model=model.source,
        prompt_mode=model.prompt_mode,
        system=model.prompt.system(inputs[0].side) if measured[0][0].words else "",
        inputs=tuple(one.label for one in inputs),
        measured=measured,
        errors=tuple(errors),
    )


def _measured(model: Gen2Embed, content: Content, side: Side, most: int) -> tuple[Measured, ...]:
    words = model.prompt.system(side)
    if not words or model.prompt.caller != "system" or model.layout == "raw" or content.system is not None:
        ids, layers = measure(model, content, side, most)
        return (Measured("", len(ids), by_position(model, content, ids, side), {}, layers),)
    return tuple(_placed(model, placed, side, most) for placed in places(content, words))


def _placed(model: Gen2Embed, placed: Placed, side: Side, most: int) -> Measured:
    ids, layers = measure(model, placed.content, side, most)
    segments = by_position(model, placed.content, ids, side)
    return Measured(placed.name, len(ids), segments, by_words(model, placed, ids, side), layers)


def _inputs(
    model: Gen2Embed, options: AttentionOptions, data: OpenedData | AskedInput, errors: list[RowError]
) -> list[AskedInput]:
    if isinstance(data, OpenedData):
        refuse_images(model.text_alone, images_in(data.tables, options.limit, options))
        return [pair[options.side != "query"] for pair in opened_rows(data, options, errors)]
    if not data.label:  # the built-in example
        photo = {"image": _photo()} if model.takes_images else {}
        return [AskedInput(f"{PHOTO if photo else ''} {EXAMPLE}".strip(), data.side, data.given | photo)]
    return [data]


def _photo() -> Any:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(PHOTO))


def text_table(result: AttentionResult) -> str:
    """Return the figures by layer as a text, and those of the words in each place."""
    names = list(result.overall())
    kinds = ("ε", "ε/u", "last", "last*")
    rows: Table = [["layer", *(f"{kind} {name}" for kind in kinds for name in names)]]
    layers = result.layers()
    rows += [[str(number), *_cells(figures, names)] for number, figures in layers.items()]
    rows.append(["mean", *_cells(result.overall(), names)])
    uniform = ", ".join(f"{name} {one.uniform:.3g}" for name, one in result.overall().items())
    lines = [as_text(rows), f"\n{LEGEND}", f"ε under uniform attention: {uniform}"]
    if result.system:
        lines += [f"\nThe words of the system prompt, mean over layers:\n\n{as_text(words_table(result))}"]
    return "\n".join(lines)


def words_table(result: AttentionResult) -> Table:
    """Return what the prompt's words receive in each place, averaged over inputs and layers."""
    rows: Table = [["the words in the", "tokens", "first", "ε", "ε/u", "last", "last*"]]
    for number, name in enumerate(result.place_names):
        one = result.overall(number, words=True)["words"]
        shares = [f"{100 * share:.1f}" for share in (one.last_row, one.last_row_without_first)]
        rows.append([name, f"{one.tokens:.0f}", f"{one.first:.0f}", f"{one.efficiency:.3g}", f"{one.over_uniform:.2f}"])
        rows[-1] += shares
    return rows


def _cells(figures: dict[str, SegmentFigures], names: Sequence[str]) -> list[str]:
    found = [figures[name] for name in names]
    return [
        *(f"{one.efficiency:.3g}" for one in found),
        *(f"{one.over_uniform:.2f}" for one in found),
        *(f"{100 * one.last_row:.1f}" for one in found),
        *(f"{100 * one.last_row_without_first:.1f}" for one in found),
    ]


def as_json(result: AttentionResult) -> dict[str, Any]:
    """Return the figures for `attention.json`."""

    def plain(layers: dict[int, dict[str, SegmentFigures]]) -> dict[str, Any]:
        return {str(number): {name: asdict(one) for name, one in found.items()} for number, found in layers.items()}

    content: dict[str, Any] = {
        "model": result.model,
        "prompt_mode": result.prompt_mode,
        "inputs": list(result.inputs),
        "num_tokens": [of_input[0].num_tokens for of_input in result.measured],
        "layers": plain(result.layers()),
        "errors": [error._asdict() for error in result.errors],
    }
    if result.system:
        content["words"] = result.system
        content["places"] = {
            name: plain(result.layers(number, words=True)) for number, name in enumerate(result.place_names)
        }
    return content
