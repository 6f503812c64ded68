"""`Gen2Embed` as mteb's encoder protocol knows it: batches in, float32 unit vectors out."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from gen2embed_mteb.bulk.encoder import BulkEncoder
from gen2embed_mteb.bulk.store import EmbeddingStore
from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.embedder.families import ImageLayout
from gen2embed_mteb.embedder.model import Gen2Embed
from gen2embed_mteb.embedder.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts import HierarchicalPrompt, Side
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.mteb_plugin.models.inputs import HeldImages, items_of, side_of
from gen2embed_mteb.mteb_plugin.names import DATASETS
from gen2embed_mteb.sugarcrepe.evaluate import CAPTION_PREFIX

MAX_HELD_PIXELS = 2**28
"""Decoded images kept at a time, in pixels: 0.8 GB of RGB."""


def load(
    name: str,
    revision: str | None = None,
    *,
    device: str | None = None,
    source: str,
    layout: ImageLayout = "native",
    prompt_mode: str | dict[str, str] | None = None,
    **options: Any,
) -> Gen2EmbedEncoder:
    """Load an encoder; `mteb.get_model` calls this through the model's metadata.

    Args:
        name: The name in mteb's registry.
        revision: Its revision; if it begins with a commit, that commit is loaded from the hub.
        device: `cpu`, `cuda`, …; None: the best there is.
        source: The hub id or directory of the weights.
        layout: How images are laid out in the prompt.
        prompt_mode: A strategy's name, or the texts of one's own as `HierarchicalPrompt` takes them.
        options: `adapter`, `max_length`, `resize`, `model_kwargs`, … as `Gen2Embed` takes them.

    Raises:
        OSError: The weights are neither there nor on the hub.
        TypeError: A `HierarchicalPrompt`: mteb names results by the options, which must be JSON for that.
        ValueError: An option that `Gen2Embed` refuses.
    """
    if isinstance(prompt_mode, HierarchicalPrompt):
        raise TypeError(
            "mteb can only keep results apart by plain options: pass prompt_mode=dataclasses.asdict(prompt)"
        )
    directory = Path(source)
    commit = re.match(r"[0-9a-f]{40}(?=-|$)", revision or "")
    model = Gen2Embed(
        source,
        layout=layout,
        prompt_mode=HierarchicalPrompt(**prompt_mode) if isinstance(prompt_mode, dict) else prompt_mode,
        device=device,
        revision=commit.group() if commit and not directory.is_dir() else None,
        # A directory needs nothing from the hub, unless it is an adapter, whose base model may lie there.
        local_files_only=directory.is_dir() and not (directory / "adapter_config.json").is_file(),
        **options,
    )
    return Gen2EmbedEncoder(model)


class Gen2EmbedEncoder(AbsEncoder):
    """An encoder for mteb, built on `Gen2Embed` and bulk encoding.

    mteb's batch size is not used: inputs are compared by content, sorted by length and batched by tokens.

    Args:
        model: The model.

    Attributes:
        model: The model.
        mteb_model_meta: mteb's metadata of the model; set by mteb.
    """

    prompts_dict = {"Compositionality": CAPTION_PREFIX}  # noqa: RUF012 # an instance attribute in mteb, too

    def __init__(self, model: Gen2Embed) -> None:
        """Keep the model."""
        self.model = model
        self._encoder = PrefixEncoder(model)
        self._labels_of = ""  # the zero-shot task whose labels were encoded last

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float32]:
        """Encode what a data loader yields.

        Args:
            inputs: A data loader of mteb: batches of `text`, `image`, or both.
            task_metadata: The task's metadata; names it, and has its instruction.
            hf_split: The split, for messages.
            hf_subset: The subset, for messages.
            prompt_type: The side; inferred where mteb gives none (see `inputs.side_of`).
            kwargs: What mteb passes on, `batch_size` among it; not used.

        Returns:
            (n, d) float32 unit rows, in the loader's order.

        Raises:
            ValueError: An input that cannot be encoded; the message names the row.
        """
        side = side_of(task_metadata, prompt_type, inputs, after_labels=self._labels_of == task_metadata.name)
        self._labels_of = task_metadata.name if side == "document" and prompt_type is None else ""
        instruction = self._instruction(task_metadata, side)
        images = HeldImages()
        items: list[Item] = []
        num_added = 0
        with tempfile.TemporaryDirectory(prefix="gen2embed-") as folder:
            # Sizes are left to the model, which resizes by its own settings.
            bulk = BulkEncoder(
                self._encoder, EmbeddingStore(folder, {}), images, image_options=ImageOptions(min_side=0)
            )
            for batch in inputs:
                items.extend(items_of(batch, side, task_metadata, instruction, images))
                if images.num_pixels > MAX_HELD_PIXELS:
                    bulk.add(side, items[num_added:], task_metadata.name)
                    images.release()
                    num_added = len(items)
            bulk.add(side, items[num_added:], task_metadata.name)
            for row, item in enumerate(items):
                fault = bulk.fault(side, item)
                if fault:
                    where = f"{task_metadata.name}, subset {hf_subset}, split {hf_split}, {side} {row}"
                    raise Gen2EmbedError(f"{where} cannot be encoded: {fault.reason}; text {item.text[:80]!r}")
            return bulk.vectors(side, items)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products, which are cosines.

        One query at a time is scored as `gen2embed evaluate` does: every row is summed in the same order, so that
        equal candidates come out equal wherever they stand. A matrix product does not promise that.

        Args:
            embeddings1: (n, d) or (d,) unit rows.
            embeddings2: (m, d) or (d,) unit rows.

        Returns:
            (n, m) float32.
        """
        left, right = (np.atleast_2d(np.asarray(part, np.float32)) for part in (embeddings1, embeddings2))
        if len(left) == 1:
            return torch.from_numpy(np.einsum("nd,d->n", right, left[0], optimize=False)[None])
        return torch.from_numpy(left @ right.T)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products row by row.

        Args:
            embeddings1: (n, d) unit rows.
            embeddings2: (n, d) unit rows.

        Returns:
            (n,) float32.
        """
        left, right = (np.atleast_2d(np.asarray(part, np.float32)) for part in (embeddings1, embeddings2))
        return torch.from_numpy(np.einsum("nd,nd->n", left, right, optimize=False))

    def _instruction(self, task_metadata: Any, side: Side) -> str:
        """Return the task's own instruction, or mteb's for tasks of its type; candidates have none.

        mteb's speak of text and passages, so that a task with images goes without where it has none of its own.
        """
        if side == "document" or task_metadata.name in DATASETS:
            return ""
        stated = task_metadata.prompt or task_metadata.type in self.prompts_dict
        if "image" in task_metadata.modalities and not stated:
            return ""
        return str(self.get_instruction(task_metadata, PromptType.query))
