"""Vectors of the tasks' texts: encoded once per prompt, with all readouts in one pass, and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gen2embed_mteb import Gen2Embed
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import EncodingConfig
from gen2embed_mteb.embedder.fingerprint import fingerprint
from gen2embed_mteb.embedder.passes.several_readouts import SeveralReadouts
from gen2embed_mteb.embedder.prompts.slots import TaskSlots
from gen2embed_mteb.embedder.prompts.strategies import TASK_STRATEGIES, HierarchicalPrompt, strategy, task_prompt
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.evaluation.run import open_bulk_encoder
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.names import Side
from real.tasks import Task

SIDES: tuple[Side, Side] = ("query", "document")
READOUTS = tuple(Readout(state, norm) for state in ("last", "pre-mlp", "drop-1", "drop-2") for norm in (True, False))
"""The readouts of the store that the benchmarks share."""
_CHUNK = 512
Vectors = dict[str, npt.NDArray[np.float32]]
"""The unit vector of each text, (d,) float32."""
Words = tuple[str, ...]
"""What stands around a text: see `around`."""


@dataclass
class VectorCache:
    """The vectors of one model under any prompt.

    Two sides, two strategies or two tasks that put the same words around a text share its vector.

    Attributes:
        model_folder: The model, with the default readout and without a calibration.
        folder: Where the vectors are kept.
        tasks: The tasks whose texts are encoded.
        readouts: The readouts, all made in one pass.
        dtype: The type that the model computes in; `None`: that of its weights.
        num_encoded: How many texts were encoded so far.
    """

    model_folder: Path
    folder: Path
    tasks: Sequence[Task]
    readouts: tuple[Readout, ...]
    dtype: str | None = None
    num_encoded: int = 0
    _known: dict[Words, dict[Readout, Vectors]] = field(default_factory=dict)

    def encode(self, strategies: Iterable[str]) -> None:
        """Encode all texts under strategies; vectors that are on disk are read."""
        texts: dict[Words, dict[str, None]] = {}
        for name in strategies:
            for side in SIDES:
                for task in self.tasks:
                    wanted = texts.setdefault(around(name, side, task), {})
                    wanted.update(dict.fromkeys(task.texts(side)))
        for words, wanted in texts.items():
            missing = [text for text in wanted if text not in self._of(words)]
            if missing:
                self._encode(words, missing)

    def of(self, name: str, readout: Readout, task: Task, side: Side) -> npt.NDArray[np.float32]:
        """Return the vectors of a task's texts under a strategy, (n, d) float32 unit rows, which must be encoded."""
        known = self._known[around(name, side, task)][readout]
        return np.stack([known[text] for text in task.texts(side)])

    def _of(self, words: Words) -> Vectors:
        return self._known.get(words, {}).get(self.readouts[0], {})

    def _encode(self, words: Words, texts: list[str]) -> None:
        system, suffix, *phrase = words
        prompt = HierarchicalPrompt(system, system, suffix, suffix, suffix, suffix, *phrase, *phrase)
        kwargs = {"dtype": self.dtype} if self.dtype else None
        model = Gen2Embed(self.model_folder, prompt_mode=prompt, device="cpu", model_kwargs=kwargs)
        encoder = SeveralReadouts(model, self.readouts)
        name = hashlib.sha256("\n".join([*words, *(one.name for one in self.readouts)]).encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)
        bulk = open_bulk_encoder(
            encoder,
            EncodingConfig(),
            ImageSource(self.folder),
            folder=self.folder / name,
            fingerprint=fingerprint(model) + "".join(one.name for one in self.readouts),
        )
        items = [Item(text) for text in texts]
        for start in range(0, len(items), _CHUNK):  # an interrupted run goes on at the last whole chunk
            shown = f"{system[:16] or '–'} … {suffix.strip()[-16:] or '–'} {start}/{len(items)}"
            bulk.add("document", items[start : start + _CHUNK], shown)
        self.num_encoded += bulk.num_encoded
        known = self._known.setdefault(words, {one: {} for one in self.readouts})
        for one, vectors in encoder.split(bulk.vectors("document", items)).items():
            known[one].update(zip(texts, vectors, strict=True))


def around(name: str, side: Side, task: Task) -> Words:
    """Return what a strategy says around a text on a side of a task.

    A strategy with texts per task says what queries and candidates are; that they are compared by their meaning is the
    same for all tasks here.

    Returns:
        The system prompt, what is appended, and the phrase that begins the answer, if there is one.
    """
    prompt = strategy(name)
    if prompt.name in TASK_STRATEGIES:
        query, document = (f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in task.kinds)
        prompt = task_prompt(prompt.name, TaskSlots(query, document, "the meaning"))
    phrase = prompt.phrase(side)
    return (prompt.system(side), prompt.suffix(side, has_image=False), *([phrase] if phrase else []))


def exported(source: Path, target: Path, **options: Any) -> Path:
    """Return a folder of a model's weights in float32, written once: a GGUF file takes a minute to read.

    Args:
        source: The folder of the model.
        target: The folder to write.
        options: Options of `Gen2Embed`.
    """
    if not (target / "modules.json").is_file():
        model = Gen2Embed(source, device="cpu", model_kwargs={"dtype": torch.float32}, prompt_mode="none", **options)
        model.save(str(target))
    return target
