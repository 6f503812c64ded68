"""How a figure was obtained, beyond the weights: figures of different methods are comparable only if this is said.

Every report prints it beside the figures, ours and published ones: the backbone, forward passes per query, unlabelled
inputs, whether the evaluation's own inputs were used (transductive), and how many candidates were reranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen2embed_mteb.config import OWN, EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import read_calibrated
from gen2embed_mteb.evaluation.tables import Table

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

COLUMNS = ("backbone", "forwards per query", "unlabelled inputs", "transductive", "rerank k")


@dataclass(frozen=True)
class Unlabelled:
    """Inputs without labels that were used beside the one that is scored: how many, and of what."""

    number: int
    of: str

    def __str__(self) -> str:
        """Return it for a table."""
        return f"{self.number:,} {self.of}".strip()


@dataclass(frozen=True)
class Method:
    """How a figure was obtained.

    Attributes:
        backbone: The generative model.
        forwards: Forward passes of the model per query, once the candidates' vectors are stored.
        unlabelled: The inputs without labels that a calibration or a score was computed from.
        transductive: Whether some of them are inputs of the evaluation.
        rerank_k: The number of candidates per query that were reranked; 0 without reranking.
    """

    backbone: str
    forwards: int = 1
    unlabelled: tuple[Unlabelled, ...] = ()
    transductive: bool = False
    rerank_k: int = 0

    def cells(self) -> list[str]:
        """Return the cells of a table, in the order of `COLUMNS`."""
        used = " + ".join(map(str, self.unlabelled))
        truth = "yes" if self.transductive else "no"
        return [self.backbone, str(self.forwards), used or "0", truth, str(self.rerank_k)]

    def sentence(self) -> str:
        """Return it as one sentence."""
        named = zip(COLUMNS, self.cells(), strict=True)
        return "; ".join(f"{name}: {cell}" for name, cell in named) + "."

    def to_json(self) -> dict[str, Any]:
        """Return it for `results.json`."""
        return {
            "backbone": self.backbone,
            "forwards_per_query": self.forwards,
            "unlabelled_inputs": [{"count": used.number, "of": used.of} for used in self.unlabelled],
            "transductive": self.transductive,
            "rerank_k": self.rerank_k,
        }

    @classmethod
    def from_json(cls, stated: Mapping[str, Any]) -> Method:
        """Return what `to_json` wrote."""
        used = tuple(Unlabelled(entry["count"], entry["of"]) for entry in stated["unlabelled_inputs"])
        forwards, k = stated["forwards_per_query"], stated["rerank_k"]
        return cls(stated["backbone"], forwards, used, stated["transductive"], k)


def method_of(config: EvaluationConfig, own_inputs: int = 0, *, reranked: bool = False) -> Method:
    """Return how the figures of a run are obtained.

    Args:
        config: The run's settings.
        own_inputs: How many inputs of the evaluation were used: with `own` all distinct ones of each dataset, with
            CSLS alone its distinct queries.
        reranked: Whether the figures are those after reranking; those before it are of the embedding alone.

    Raises:
        Gen2EmbedError: The calibrated folder cannot be read.
    """
    used = []
    if config.calibrated_on:
        used.append(Unlabelled(config.calibrated_on, config.calibration_data))
    if config.calibration and config.calibration != OWN:
        record = read_calibrated(config.calibration).record
        used.append(Unlabelled(record.num_queries + record.num_documents, record.data))
    if config.transductive:
        used.append(Unlabelled(own_inputs, "own inputs" if config.calibration == OWN else "own queries"))
    backbone = config.backbone or (Path(config.model_name).name if config.model_name else "model")
    k = config.rerank_top if reranked else 0
    forwards = 1 + k * config.forwards_per_candidate
    return Method(backbone, forwards, tuple(used), transductive=config.transductive, rerank_k=k)


def facts_of(model: Gen2Embed, name: str) -> dict[str, Any]:
    """Return what the reports need to know of a model, as fields of `EvaluationConfig`.

    Args:
        model: The model that is evaluated.
        name: What it was loaded by.

    Returns:
        Its backbone: the base model of an adapter, otherwise the last part of its name; and what the model itself was
        calibrated on.
    """
    adapters = getattr(model[0].model, "peft_config", None) or {}
    bases = [adapter.base_model_name_or_path for adapter in adapters.values()]
    facts: dict[str, Any] = {"backbone": Path(next(filter(None, bases), name)).name}
    if model.calibration is not None:
        record = model.calibration
        facts |= {"calibrated_on": record.num_queries + record.num_documents, "calibration_data": record.data}
    return facts


def described(config: EvaluationConfig) -> str:
    """Return readout, calibration and scoring, as far as they are not the default, for the title of a report."""
    parts = [] if config.readout == "last" else [f"readout `{config.readout}`"]
    parts += [f"compared by `{config.comparison}`"] if config.comparison else []
    return "".join(f", {part}" for part in parts)


def comparable_only(method: Method) -> str:
    """Return a warning for a transductive run; empty for any other."""
    if not method.transductive:
        return ""
    used = method.unlabelled[-1]
    return (
        f"Transductive: {used.number:,} unlabelled {'inputs' if 'inputs' in used.of else 'queries'} of the evaluation "
        "itself were used; compare with transductive figures only."
    )


def methods_table(rows: Sequence[tuple[str, Method]]) -> Table:
    """Return a table of methods, with a header.

    Args:
        rows: A label and a method per row.
    """
    return [["", *COLUMNS], *([label, *method.cells()] for label, method in rows)]
