"""The vectors of items under several prompts and readouts, where equal words around an item are encoded once.

What a prompt says around an item is a system turn and what is appended to the user turn; both depend on the side, and
the second on whether there is an image. Two prompts, or the two sides of one, that say the same share the vectors: the
candidates of `system` and of `hierarchical`, for example.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.types import Fault, Item
from gen2embed_mteb.config import EvaluationConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.several_readouts import open_readouts
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt, strategy
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.evaluation.run import open_bulk_encoder
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

FOLDER = "readouts"
"""The folder in that of the vectors."""


class Words(NamedTuple):
    """What is said around an item, and the side that it is encoded on.

    The side is that of the item only if the model has system prompts of its own that differ by side.
    """

    system: str
    suffix: str
    side: Side

    @property
    def prompt(self) -> HierarchicalPrompt:
        """The prompt that says this around every item."""
        return HierarchicalPrompt(
            query_system=self.system,
            document_system=self.system,
            query_text=self.suffix,
            query_image=self.suffix,
            document_text=self.suffix,
            document_image=self.suffix,
        )


class ItemGroup(NamedTuple):
    """Items of one side that are encoded together, and what they are, for the progress bar."""

    side: Side
    items: Sequence[Item]
    label: str


@dataclass
class PromptVectors:
    """The vectors of items of one source under several prompts.

    Attributes:
        model: The model, as it was published.
        readouts: r readouts, all of one forward pass.
        prompts: The names of the prompts.
        config: The settings of the run.
        images: The source of the items' images.
        name: The name of the items' folder.
        num_encoded: How many inputs went through the model in this run.
    """

    model: Gen2Embed
    readouts: tuple[Readout, ...]
    prompts: tuple[str, ...]
    config: EvaluationConfig
    images: ImageSource
    name: str
    num_encoded: int = 0
    _said: dict[tuple[str, Side, bool], Words] = field(default_factory=dict)
    _encoded: dict[Words, BulkEncoder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find out what each prompt says where."""
        same = self.model.side_prompt("query") == self.model.side_prompt("document")
        sides: tuple[Side, Side] = ("query", "document")
        for name in self.prompts:
            prompt = strategy(name)
            for side in sides:
                for has_image in (False, True):
                    said = Words(prompt.system(side), prompt.suffix(side, has_image), "document" if same else side)
                    self._said[name, side, has_image] = said

    def words(self, prompt: str, side: Side, item: Item) -> Words:
        """Return what a prompt says around an item."""
        return self._said[prompt, side, bool(item.images)]

    def all_words(self) -> list[Words]:
        """Return everything that a prompt says around items, each once."""
        return list(dict.fromkeys(self._said.values()))

    def encode(self, words: Words, groups: Iterable[ItemGroup]) -> None:
        """Encode items that these words are said around; vectors that are stored are read.

        Args:
            words: The words; the model must have the prompt `words.prompt`.
            groups: Items of all sides. Those that the words are not said around, under no prompt, are left out.
        """
        names = "".join(f" {one.name}" for one in self.readouts)
        digest = hashlib.sha256("\n".join([*words, names]).encode()).hexdigest()[:16]
        bulk = open_bulk_encoder(
            open_readouts(self.model, self.readouts),
            self.config,
            self.images,
            folder=self.config.vectors_folder / FOLDER / self.name / digest,
            fingerprint=fingerprint(self.model) + names,
        )
        for group in groups:
            wanted = [item for item in group.items if self._is_said(words, group.side, item)]
            if wanted:
                bulk.add(words.side, wanted, group.label)
        self.num_encoded += bulk.num_encoded
        self._encoded[words] = bulk

    def under(self, prompt: str) -> ItemsUnderPrompt:
        """Return the items under a prompt; they must have been encoded with all its words."""
        return ItemsUnderPrompt(self, prompt, self._encoded)

    def _is_said(self, words: Words, side: Side, item: Item) -> bool:
        return any(self.words(prompt, side, item) == words for prompt in self.prompts)


@dataclass(frozen=True)
class ItemsUnderPrompt:
    """Items that were encoded, as one prompt has them; see `planned_rows.Encoded`."""

    owner: PromptVectors
    prompt: str
    encoded: Mapping[Words, BulkEncoder]

    def fault(self, side: Side, item: Item) -> Fault | None:
        """Return the reason why an item has no vector; `None` if it has one."""
        words = self.owner.words(self.prompt, side, item)
        return self.encoded[words].fault(words.side, item)

    def content(self, item: Item) -> tuple[str, tuple[str, ...]]:
        """Return what is equal for equal texts and images."""
        for side in ("document", "query"):
            words = self.owner.words(self.prompt, side, item)
            try:
                return self.encoded[words].content(item)
            except KeyError:  # it has images, and was added on the other side alone
                continue
        raise KeyError(item)

    def vectors(self, side: Side, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Return the vectors of items without a fault, (n, r * d) float32: the readouts side by side."""
        places: dict[Words, list[int]] = {}
        for number, item in enumerate(items):
            places.setdefault(self.owner.words(self.prompt, side, item), []).append(number)
        out = np.zeros((len(items), 0), np.float32)
        for words, numbers in places.items():
            found = self.encoded[words].vectors(words.side, [items[number] for number in numbers])
            if not out.shape[1]:
                out = np.empty((len(items), found.shape[1]), np.float32)
            out[numbers] = found
        return out
