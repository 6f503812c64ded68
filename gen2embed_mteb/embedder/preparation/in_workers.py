"""What a worker process needs of a `Gen2Embed` to prepare inputs: everything but the weights.

The same methods run on the same processor and tokenizer, so the features are those of the model itself, to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy.typing as npt
import torch

from gen2embed_mteb.embedder.preparation.compact_patches import CompactPatches
from gen2embed_mteb.embedder.preparation.features import PreparesInputs
from gen2embed_mteb.embedder.preparation.token_runs import repeat_image_tokens


class Weightless:
    """What stands in for a model of transformers where inputs are prepared: its configuration alone."""

    def __init__(self, config: Any) -> None:
        """Keep the configuration."""
        self.config = config


class WithoutWeights(PreparesInputs):
    """The part of a `Gen2Embed` that prepares inputs; it can be pickled.

    Args:
        model: The model, with which it shares processor and tokenizer.
    """

    def __init__(self, model: PreparesInputs) -> None:
        """Keep what preparing needs; the constructor of sentence-transformers would load a model."""
        torch.nn.Module.__init__(self)
        self.source, self.image_root, self.image_options = model.source, model.image_root, model.image_options
        self._layout, self._pooling = model._layout, model._pooling
        first = copy.copy(model[0])
        vars(first).update(_modules={}, model=Weightless(model[0].config))
        self._modules["0"] = first


class FeaturePreparer:
    """Makes features of inputs in a worker process.

    Args:
        model: The model.
        patches: The compact form in which patches of images are returned; `None`: as the processor returns them.
    """

    def __init__(self, model: PreparesInputs, patches: CompactPatches | None) -> None:
        """Keep a copy of the model without weights."""
        self._model, self._patches = WithoutWeights(model), patches

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Quicken the processor of this process, which no other object has."""
        vars(self).update(state)
        torch.set_num_threads(1)
        repeat_image_tokens(self._model.processor)
        if self._patches is not None:
            self._patches.install(self._model.processor.image_processor)

    def __call__(self, arguments: Any, inputs: list[dict[str, Any]], /) -> dict[str, npt.NDArray[Any]]:
        """Return the features of a batch, by name.

        Args:
            arguments: The side, and the prompt of the side or the dataset.
            inputs: As for `PreparesInputs.preprocess`.
        """
        features = self._model.preprocess(inputs, prompt=arguments["prompt"], task=arguments["side"])
        return {name: value.numpy() for name, value in features.items() if isinstance(value, torch.Tensor)}
