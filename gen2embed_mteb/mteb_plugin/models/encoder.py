"""`Gen2Embed` with the methods of mteb's encoder protocol: it encodes batches as float32 unit vectors."""

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
from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder
from gen2embed_mteb.embedder.prompts.strategies import HierarchicalPrompt
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images.resizing import ImageOptions
from gen2embed_mteb.mteb_plugin.models.inputs import HeldImages, items_of, side_of
from gen2embed_mteb.mteb_plugin.names import DATASETS
from gen2embed_mteb.names import Side
from gen2embed_mteb.sugarcrepe.evaluate import CAPTION_PREFIX

MAX_HELD_PIXELS = 2**28
"""The most pixels of decoded images in memory at a time: 0.8 GB of RGB."""


def load(
    name: str,
    revision: str | None = None,
    *,
    device: str | None = None,
    source: str,
    layout: ImageLayout = "native",
    prompt_mode: str | dict[str, Any] | None = None,
    embed_dim: int | None = None,
    **options: Any,
) -> Gen2EmbedEncoder:
    """Load an encoder; `mteb.get_model` calls this through the model's metadata.

    Args:
        name: The name in mteb's registry.
        revision: Its revision; if it begins with a commit, that commit is loaded from the hub.
        device: `cpu`, `cuda`, …; None stands for the best available device.
        source: The hub id or directory of the weights.
        layout: How images are laid out in the prompt.
        prompt_mode: The name of a strategy, or the fields of a `HierarchicalPrompt`.
        embed_dim: How many dimensions of a vector are kept, as mteb calls it; None: all.
        options: `adapter`, `max_length`, `resize`, `model_kwargs`, … as for `Gen2Embed`.

    Raises:
        OSError: The weights are neither in a local directory nor on the hub.
        TypeError: `prompt_mode` is a `HierarchicalPrompt`: mteb names results by the options, which must be JSON.
        ValueError: `Gen2Embed` refuses an option.
    """
    if isinstance(prompt_mode, HierarchicalPrompt):
        raise TypeError(
            "mteb can only keep results apart by plain options: pass prompt_mode=dataclasses.asdict(prompt)"
        )
    if embed_dim is not None:
        options["truncate_dim"] = embed_dim
    directory = Path(source)
    commit = re.match(r"[0-9a-f]{40}(?=-|$)", revision or "")
    model = Gen2Embed(
        source,
        layout=layout,
        prompt_mode=HierarchicalPrompt(**prompt_mode) if isinstance(prompt_mode, dict) else prompt_mode,
        device=device,
        revision=commit.group() if commit and not directory.is_dir() else None,
        # A directory needs nothing from the hub, unless it is an adapter, whose base model may be there.
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
        """Encode the batches of a data loader.

        Args:
            inputs: A data loader of mteb: batches of `text`, `image`, or both.
            task_metadata: The task's metadata, with its name and its instruction.
            hf_split: The split, for messages.
            hf_subset: The subset, for messages.
            prompt_type: The side; inferred if mteb gives none (see `inputs.side_of`).
            kwargs: Other arguments of mteb, such as `batch_size`; not used.

        Returns:
            (n, d) float32 unit rows, in the loader's order.

        Raises:
            ValueError: An input cannot be encoded; the message names the row.
        """
        side = side_of(task_metadata, prompt_type, inputs, after_labels=self._labels_of == task_metadata.name)
        self._labels_of = task_metadata.name if side == "document" and prompt_type is None else ""
        instruction = self.instruction(task_metadata, side)
        known = DATASETS.get(task_metadata.name)
        encoder = self._encoder.for_dataset(known.name if known else task_metadata.name) or self._encoder
        images = HeldImages()
        items: list[Item] = []
        num_added = 0
        with tempfile.TemporaryDirectory(prefix="gen2embed-", ignore_cleanup_errors=True) as folder:
            # No resizing here: the model resizes by its own settings.
            bulk = BulkEncoder(encoder, EmbeddingStore(folder, {}), images, image_options=ImageOptions(min_side=0))
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
        """Return inner products, which are cosines for unit rows.

        A single query is scored as in `gen2embed evaluate`: every row is summed in the same order, so that equal
        candidates get equal scores at any position. A matrix product does not guarantee that.

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
        """Return inner products row by row.

        Args:
            embeddings1: (n, d) unit rows.
            embeddings2: (n, d) unit rows.

        Returns:
            (n,) float32.
        """
        left, right = (np.atleast_2d(np.asarray(part, np.float32)) for part in (embeddings1, embeddings2))
        return torch.from_numpy(np.einsum("nd,nd->n", left, right, optimize=False))

    def instruction(self, task_metadata: Any, side: Side) -> str:
        """Return the task's own instruction, or else mteb's for tasks of its type; candidates have none.

        mteb's instructions mention text and passages, so a task with images that has no instruction gets none.

        Args:
            task_metadata: The task's metadata.
            side: `query` or `document`.
        """
        if side == "document" or task_metadata.name in DATASETS:
            return ""
        stated = task_metadata.prompt or task_metadata.type in self.prompts_dict
        if "image" in task_metadata.modalities and not stated:
            return ""
        return str(self.get_instruction(task_metadata, PromptType.query))
