"""Several readouts of a model from one forward pass, to compare them without encoding again for each.

Every readout is a state that the full model passes through: the final norm's input, the input of the norm before the
last MLP, the input of one of the last layers. All are kept at each input's last token, with and without the final norm.
The vectors are those of a model that was loaded with that readout, up to rounding.

Cost: that of the model's own pass, and one norm per readout; r readouts of width d take r times d numbers per input.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from gen2embed_mteb.embedder.passes.prefix_cache import PrefixEncoder, Prepared
from gen2embed_mteb.embedder.prompts.dataset_prompts import all_of
from gen2embed_mteb.embedder.readouts.choice import LAST, PRE_MLP, Readout
from gen2embed_mteb.embedder.readouts.decoder_parts import DecoderParts
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed


class SeveralReadouts(PrefixEncoder):
    """Bulk encoding that returns the vectors of several readouts side by side; `split` separates them.

    Args:
        model: The model, with the default readout and without a calibration.
        readouts: r readouts.
        reuse_prefix: `False` runs every input in full.
    """

    def __init__(self, model: Gen2Embed, readouts: Sequence[Readout], *, reuse_prefix: bool = True) -> None:
        """Find the states in the decoder.

        Raises:
            Gen2EmbedError: The model has another readout or a module behind its normalisation, a readout is named
                twice, or the decoder passes through no such state.
        """
        super().__init__(model, reuse_prefix=reuse_prefix)
        require_as_published(model)
        if not readouts or len(set(readouts)) < len(readouts):
            raise Gen2EmbedError(f"readouts are {[one.name for one in readouts]}; name each once, and at least one")
        self.readouts = tuple(readouts)
        self._parts = DecoderParts(model[0].model, self._refusal)
        self._norm: Any = getattr(self._parts.decoder, self._parts.norm_name)
        self._places = {one.state: self._place(one) for one in self.readouts}
        if PRE_MLP in self._places:
            self._check_pre_mlp()
        if not all(one.norm for one in self.readouts):
            self._check_raw()

    def split(self, vectors: npt.NDArray[np.float32]) -> dict[Readout, npt.NDArray[np.float32]]:
        """Separate the readouts' vectors.

        Args:
            vectors: (n, r * d) float32, as returned by this encoder.

        Returns:
            For each readout (n, d) float32 unit rows.
        """
        return split(vectors, self.readouts)

    @torch.inference_mode()
    def encode_prepared(self, side: Side, batch: Prepared) -> npt.NDArray[np.float32]:
        """Run a prepared batch, and return (n, r * d) float32 unit rows: the readouts side by side."""
        with self._watched(self._places) as seen:
            self._last_hidden_state(side, batch)
        rows = torch.arange(len(batch.last))
        vectors = []
        for one in self.readouts:
            state = seen[one.state][rows, batch.last.to(seen[one.state].device)]
            state = self._norm(state) if one.norm else state
            vectors.append(functional.normalize(state.float(), dim=1))
        return np.asarray((torch.cat(vectors, dim=1) / len(vectors) ** 0.5).cpu().numpy(), dtype=np.float32)

    def _refusal(self, reason: str) -> Gen2EmbedError:
        return Gen2EmbedError(
            f"several readouts at once are not possible for {self._model.source} (model type "
            f"{self._model[0].config.model_type!r}): {reason}. Encode with one readout at a time"
        )

    def _place(self, readout: Readout) -> nn.Module:
        """Return the module whose input is the state of a readout."""
        if readout.state == LAST:
            return self._norm
        if readout.state == PRE_MLP:
            name = self._parts.before_mlp_name
            return getattr(self._parts.layers[-1], name)
        if readout.num_dropped >= len(self._parts.layers):
            raise self._refusal(f"{readout.state!r} leaves none of its {len(self._parts.layers)} layers")
        return self._parts.layers[-readout.num_dropped]

    @staticmethod
    @contextmanager
    def _watched(places: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
        """Keep the states that this thread's forward pass hands to modules: (n, length, d), by the modules' names."""
        seen: dict[str, torch.Tensor] = {}
        thread = threading.get_ident()

        def keep(state: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if threading.get_ident() == thread:
                    seen[state] = args[0] if args else kwargs["hidden_states"]

            return hook

        handles = [module.register_forward_pre_hook(keep(state), with_kwargs=True) for state, module in places.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _check_pre_mlp(self) -> None:
        """Compare the state before the last MLP with the final norm's input where that MLP returns zeros."""
        with self._watched(self._places) as seen:
            self._parts.run_tokens()
        layer, name = self._parts.layers[-1], self._parts.mlp_name
        mlp = getattr(layer, name)
        self._parts.leave_mlp_out()
        try:
            with self._watched({LAST: self._norm}) as expected:
                self._parts.run_tokens()
        finally:
            setattr(layer, name, mlp)
        if seen[PRE_MLP].shape != expected[LAST].shape or not torch.allclose(
            seen[PRE_MLP], expected[LAST], rtol=1e-4, atol=1e-6
        ):
            raise self._refusal("no part of its last layer takes the state before the MLP")

    def _check_raw(self) -> None:
        """Refuse a final norm that does more than scale: no model can be loaded without it."""
        try:
            self._parts.leave_norm_weights_out()
        finally:
            setattr(self._parts.decoder, self._parts.norm_name, self._norm)


def require_as_published(model: Gen2Embed) -> None:
    """Refuse a model of which several readouts cannot be taken, whatever its family.

    Raises:
        Gen2EmbedError: The model has another readout than the default one, or a module behind its normalisation; or it
            pools a phrase, or has prompts of datasets.
    """
    modules = [type(module).__name__ for module in model]
    if not Readout(model.readout, model.readout_norm).is_default or modules[2:] != ["Normalize"]:
        raise Gen2EmbedError(
            f"{model.source} has the readout {model.readout!r} and the modules {', '.join(modules)}; several "
            "readouts at once need the model as it was published: no readout, calibration or module behind it"
        )
    if model.pooling != "last" or all_of(model):
        raise Gen2EmbedError(
            f"{model.source} has the prompt {model.prompt_mode!r} and the pooling {model.pooling!r}; several "
            "readouts at once need the last token, and a prompt without texts per dataset"
        )


def possible_readouts(model: Gen2Embed, readouts: Sequence[Readout]) -> tuple[tuple[Readout, ...], dict[Readout, str]]:
    """Return those readouts that `open_readouts` can give of a model, in order; and why not, for each of the others.

    Args:
        model: The model, as it was published.
        readouts: The readouts; the default one is always possible.
    """
    refused: dict[Readout, str] = {}
    for one in readouts:
        try:
            SeveralReadouts(model, [one])
        except Gen2EmbedError as error:
            if not one.is_default:
                refused[one] = str(error)
    return tuple(one for one in readouts if one not in refused), refused


def open_readouts(model: Gen2Embed, readouts: Sequence[Readout]) -> PrefixEncoder:
    """Return a bulk encoder of possible readouts; the default one alone needs no knowledge of the model's parts."""
    return PrefixEncoder(model) if tuple(readouts) == (Readout(),) else SeveralReadouts(model, readouts)


def split(vectors: npt.NDArray[np.float32], readouts: Sequence[Readout]) -> dict[Readout, npt.NDArray[np.float32]]:
    """Separate the vectors of readouts.

    Args:
        vectors: (n, r * d) float32, the readouts side by side.
        readouts: The r readouts.

    Returns:
        For each readout (n, d) float32 unit rows.
    """
    parts = np.split(vectors, len(readouts), axis=1)
    return {one: part / np.linalg.norm(part, axis=1, keepdims=True) for one, part in zip(readouts, parts, strict=True)}
