"""How many tokens images become, for the processor of any family.

A rendered conversation holds one placeholder per image, and the processor writes many tokens in its place. Most
processors can say how many for a size in pixels (`_get_num_multimodal_tokens`), but not all count the same tokens: some
leave out the marks around an image, some count as if every image stood alone. So the answer is compared with what the
processor really writes for blank images, once per processor:

1. Two blank images of different sizes: the answer is used with the constant that is missing, or not at all.
2. Both in one input: their numbers add up, or inputs with several images are measured as a whole.
3. The tokens beside an image: if they may merge with the text around them, only the whole input can be counted exactly.

Where there is no answer to rely on, the processor runs on blank images, once per new size (5 to 20 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from PIL import Image

from gen2embed_mteb.embedder.preparation.inputs import Content
from gen2embed_mteb.errors import Gen2EmbedError, one_line
from gen2embed_mteb.images.decoding import Size

PROBES: tuple[Size, Size] = ((64, 64), (640, 280))
"""Sizes of the two blank images: a square, and one that is large and wide enough to be cut into tiles."""
_OPTIONS = {"truncation": False}


class Renderer:
    """Turns conversations into token ids, before and after the processor puts images in.

    Args:
        transformer: The first module of the model.
        options: Options for the chat template (`Family.processing_kwargs["chat_template"]`).
        side: "query", "document", or `None`.
    """

    def __init__(self, transformer: Any, options: dict[str, Any], side: str | None) -> None:
        """Keep the arguments; nothing is rendered yet."""
        self._transformer, self._options, self._side = transformer, options, side
        self.processor = transformer.processor
        self.tokenizer = transformer.tokenizer

    def rendered(self, content: Content) -> list[int]:
        """Return the ids of the rendered conversation, with one placeholder per image and no token of the tokenizer's.

        The tokens that a tokenizer adds itself (`<s>`) are not among them; see `ImageTokens.added`.
        """
        ids = self.tokenizer.apply_chat_template(
            content.as_messages(),
            chat_template=self.processor.chat_template,
            return_dict=False,
            **self._options,
            **({} if self._side is None else {"task": self._side}),
        )
        return list(ids)

    def real(self, content: Content) -> list[int]:
        """Return the ids that reach the model; the images are processed for that."""
        features = self._transformer.preprocess(
            [content.as_messages()], processing_kwargs={"text": dict(_OPTIONS)}, task=self._side
        )
        return [int(token) for token in features["input_ids"][0]]


@dataclass
class _Facts:
    """What was found out about a processor.

    Attributes:
        added: Tokens that the tokenizer adds to every input.
        offset: What is missing in the processor's own answer for an image; `None` if its answer cannot be used.
        exact: Whether no token of an image can merge with the text around it.
        adds_up: Whether the images of an input have as many tokens together as each alone.
        totals: The tokens of the images of an input, by their sizes.
    """

    added: int | None = None
    probed: bool = False
    offset: int | None = None
    exact: bool = True
    adds_up: bool | None = None
    totals: dict[tuple[Size, ...], int] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[Any, tuple[str, _Facts]] = WeakKeyDictionary()


class ImageTokens:
    """Counts the tokens of images by their sizes; what was measured is kept as long as the processor.

    Args:
        renderer: Renders conversations with the processor.
    """

    def __init__(self, renderer: Renderer) -> None:
        """Look up what is known about the processor; nothing is measured yet."""
        self._renderer = renderer
        processor = renderer.processor
        # Settings may be changed after loading, such as the number of pixels, and the template with the prompt.
        images = getattr(processor, "image_processor", None)
        settings = f"{None if images is None else vars(images)} {processor.chat_template}"
        known = _KNOWN.get(processor)
        if known is None or known[0] != settings:
            known = _KNOWN[processor] = (settings, _Facts())
        self._facts = known[1]

    @property
    def added(self) -> int:
        """The number of tokens that the tokenizer adds to every rendered conversation, such as one `<s>`."""
        if self._facts.added is None:
            empty = Content("")
            self._facts.added = len(self._renderer.real(empty)) - len(self._renderer.rendered(empty))
        return self._facts.added

    @property
    def exact(self) -> bool:
        """Whether the tokens of an input with images are those of its rendered text and of its images."""
        self._probe()
        return self._facts.exact

    def total(self, sizes: Sequence[Size]) -> int:
        """Return the number of tokens that the images of one input become.

        Args:
            sizes: The (width, height) of each image, in pixels.

        Raises:
            Gen2EmbedError: The model reads no images, the processor refuses a size (Qwen's does so if the sides differ
                by more than 200 to 1), or it cannot take several images.
        """
        key = tuple(sizes)
        if not key:
            return 0
        if key not in self._facts.totals:
            self._probe()
            if len(key) > 1 and self._adds_up():
                return sum(self.total([size]) for size in key)
            if len(key) > 1 or self._facts.offset is None:
                self._facts.totals[key] = self._measured(key)
            else:
                self._learn([key[0]])
        return self._facts.totals[key]

    def totals(self, rows: Sequence[Sequence[Size]]) -> list[int]:
        """Return the number of tokens of the images of many inputs.

        Sizes that the processor refuses count as 0; they are reported when the input is prepared.
        """
        distinct = list(dict.fromkeys(size for row in rows for size in row if (size,) not in self._facts.totals))
        if distinct:
            try:
                self._probe()
                if self._facts.offset is not None:
                    self._learn(distinct)
            except Gen2EmbedError:
                pass  # one of them is refused: `_total_or_zero` finds which
        return [self._total_or_zero(row) for row in rows]

    def _total_or_zero(self, sizes: Sequence[Size]) -> int:
        try:
            return self.total(sizes)
        except Gen2EmbedError:
            return 0 if len(sizes) == 1 else sum(self._total_or_zero([size]) for size in sizes)

    def _learn(self, sizes: list[Size]) -> None:
        """Keep the processor's own answers for these sizes, corrected by what is missing in them."""
        offset = self._facts.offset or 0
        for size, answer in zip(sizes, self._answers(sizes), strict=True):
            self._facts.totals[(size,)] = answer + offset

    def _answers(self, sizes: Sequence[Size]) -> list[int]:
        swapped = [(height, width) for width, height in sizes]
        try:
            return list(self._renderer.processor._get_num_multimodal_tokens(image_sizes=swapped).num_image_tokens)
        except ValueError as error:
            raise _refused(sizes, error) from error

    def _probe(self) -> None:
        """Compare the processor's answers with what it writes for blank images, once."""
        facts = self._facts
        if facts.probed:
            return
        if not hasattr(self._renderer.processor, "image_processor"):
            raise Gen2EmbedError("this model reads text alone: leave the images out, or use a multimodal model")
        measured = [self._measured((size,)) for size in PROBES]
        if hasattr(self._renderer.processor, "_get_num_multimodal_tokens"):
            try:
                answers = self._answers(PROBES)
            except Exception:  # whatever a processor raises, it gives no answer to rely on
                answers = []
            missing = {there - said for there, said in zip(measured, answers, strict=bool(answers))}
            facts.offset = missing.pop() if len(missing) == 1 else None
        if facts.offset is None:
            facts.totals |= {(size,): tokens for size, tokens in zip(PROBES, measured, strict=True)}
        facts.exact = self._stands_apart()
        facts.probed = True

    def _adds_up(self) -> bool:
        facts = self._facts
        if facts.adds_up is None:
            facts.adds_up = self._measured(PROBES) == sum(self.total([size]) for size in PROBES)
        return facts.adds_up

    def _stands_apart(self) -> bool:
        """Return whether what the processor writes for an image begins and ends with special tokens."""
        content = _blank(PROBES[:1])
        real, rendered = self._renderer.real(content), self._renderer.rendered(content)
        shared = min(len(real), len(rendered))
        start = next((i for i in range(shared) if real[i] != rendered[i]), shared)
        behind = next((i for i in range(1, shared - start + 1) if real[-i] != rendered[-i]), shared - start + 1) - 1
        written = real[start : len(real) - behind]
        special = self._renderer.tokenizer.added_tokens_decoder
        return all(token in special for token in (*written[:1], *written[-1:]))

    def _measured(self, sizes: tuple[Size, ...]) -> int:
        """Return the number of tokens of blank images of these sizes, by running the processor."""
        content = _blank(sizes)
        try:
            real = len(self._renderer.real(content))
        except Gen2EmbedError:
            raise
        except Exception as error:  # a processor may raise anything
            if len(sizes) > 1:
                name = type(self._renderer.processor).__name__
                raise Gen2EmbedError(
                    f"{name} cannot take {len(sizes)} images in one input ({type(error).__name__}: {one_line(error)}); "
                    "pass one image per input, or use another model"
                ) from error
            raise _refused(sizes, error) from error
        return real - self.added - len(self._renderer.rendered(content)) + len(sizes)


def _blank(sizes: Sequence[Size]) -> Content:
    return Content("", tuple(Image.new("RGB", size) for size in sizes))


def _refused(sizes: Sequence[Size], error: Exception) -> Gen2EmbedError:
    shown = ", ".join(f"{width}x{height}" for width, height in sizes[:5])
    # A ValueError is what processors raise for sides that differ too much.
    remedy = "min_side=28 enlarges them" if isinstance(error, ValueError) else "give them another shape or size"
    return Gen2EmbedError(f"the model's processor refuses images of {shown} pixels ({one_line(error)}); {remedy}")
