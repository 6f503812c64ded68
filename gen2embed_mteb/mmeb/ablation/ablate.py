"""Every prompt x readout x calibration x scoring of one model on a benchmark of MMEB's form, without encoding for each.

1. Whatever is said around an input is said once: prompts that say the same share the vector (`prompt_vectors.py`).
2. One forward pass gives the states of all readouts (`embedder/passes/several_readouts.py`).
3. Calibrations and CSLS follow from stored vectors (`comparison.py`): none; a map per prompt and readout, fitted on
   training inputs with the default settings; `own`, fitted per dataset on its own inputs.

Every figure is that of a run of `evaluate` with the same settings; vectors differ by rounding alone.

Cost: r readouts of width d take r * d float32 numbers per input on disk, and in memory for one dataset and prompt at a
time; r maps of d x d float64 numbers at a time; one decomposition of d x d for each map that is fitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from gen2embed_mteb.bulk.types import Item
from gen2embed_mteb.config import OWN, AblationOptions, EvaluationConfig
from gen2embed_mteb.embedder.calibration.affine_map import AffineMap
from gen2embed_mteb.embedder.calibration.fitting import CalibrationRecord, Moments, fit
from gen2embed_mteb.embedder.passes.several_readouts import possible_readouts, require_as_published, split
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.embedder.readouts.choice import Readout
from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.evaluation.csls import csls, inner_products
from gen2embed_mteb.evaluation.method import Method, method_of
from gen2embed_mteb.evaluation.run import RowError, RunSummary, image_source, refuse_images
from gen2embed_mteb.images.source import ImageSource
from gen2embed_mteb.mmeb.ablation.prompt_vectors import ItemGroup, PromptVectors
from gen2embed_mteb.mmeb.comparison import require_own_inputs
from gen2embed_mteb.mmeb.datasets import Benchmark, DatasetInfo
from gen2embed_mteb.mmeb.evaluate import images_in
from gen2embed_mteb.mmeb.planned_rows import Found, Plan
from gen2embed_mteb.mmeb.readers import eval_columns
from gen2embed_mteb.mmeb.scoring import DatasetScore, RowScore, row_score
from gen2embed_mteb.mmeb.tables import SubsetTable, open_subsets
from gen2embed_mteb.names import Side

if TYPE_CHECKING:
    from gen2embed_mteb.embedder.model import Gen2Embed

logger = logging.getLogger(__name__)

NONE, FITTED = "none", "fitted"
"""Calibrations beside `own`: none, and a map that is fitted on training inputs."""
_CHUNK = 4096


@dataclass(frozen=True)
class FitInputs:
    """Inputs without labels that calibrations are fitted on.

    Attributes:
        queries: Distinct queries.
        documents: Distinct candidates.
        images: Opens their images.
        data: What they are, for the reports.
        num_rejected: How many rows of the data cannot be used.
    """

    queries: Sequence[Item]
    documents: Sequence[Item]
    images: ImageSource
    data: str
    num_rejected: int = 0

    def __post_init__(self) -> None:
        """Check that there are enough, before hours of encoding.

        Raises:
            Gen2EmbedError: There are fewer than 100, or none of a side.
        """
        CalibrationRecord(len(self.queries), len(self.documents), 1.0, "shared", self.data)

    @property
    def of_sides(self) -> tuple[tuple[Side, Sequence[Item]], ...]:
        """The inputs by side."""
        return ("query", self.queries), ("document", self.documents)


@dataclass(frozen=True)
class Combination:
    """One row of the table.

    Attributes:
        prompt: The prompt's name.
        readout: The readout.
        calibration: `none`, `fitted` or `own`.
        scoring: `cosine` or `csls`.
        scores: One per dataset, in order.
        method: How the figures were obtained.
    """

    prompt: str
    readout: Readout
    calibration: str
    scoring: str
    scores: tuple[DatasetScore, ...]
    method: Method


@dataclass(frozen=True, kw_only=True)
class AblationResult(RunSummary):
    """The outcome.

    Attributes:
        benchmark: The benchmark, with the chosen datasets only.
        combinations: The rows of the table, in order.
        left_out: What could not be tabled, and why.
        num_encoded: How many inputs went through the model in this run.
    """

    errors_file: ClassVar[str] = "ablation_errors.jsonl"
    benchmark: Benchmark
    combinations: tuple[Combination, ...]
    left_out: Mapping[str, str]
    num_encoded: int


def ablate(
    model: Gen2Embed,
    benchmark: Benchmark,
    config: EvaluationConfig,
    options: AblationOptions,
    inputs: FitInputs | None = None,
) -> AblationResult:
    """Evaluate every combination.

    Args:
        model: The model, as it was published: its readout the default one, and no calibration. Its prompt is changed,
            and changed back at the end.
        benchmark: MMEB, or another of its form.
        config: The run's settings, without calibration, scoring and reranking.
        options: What is tabled.
        inputs: What calibrations are fitted on; `None`: none is fitted.

    Raises:
        DataError: A dataset or a column is missing, or a file is damaged.
        FileNotFoundError: The images cannot be found.
        Gen2EmbedError: The model has a readout or a calibration, it can give none of the readouts, it takes text alone
            and a dataset has images, or too many of the inputs to fit on cannot be used.
        StoreMismatchError: The folder of the vectors belongs to another model.
    """
    start = time.monotonic()
    require_as_published(model)
    chosen = benchmark.select(config.subsets, config.meta_tasks)
    tables = open_subsets(config.data_dir, chosen.datasets, config.split)
    for dataset, table in tables:
        table.require(eval_columns(dataset, table.columns))
    refuse_images(model.text_alone, images_in(tables, config.limit, config))
    readouts, refused = possible_readouts(model, options.readouts)
    left_out = {f"readout {one.name}": reason for one, reason in refused.items()}
    if not readouts:
        raise Gen2EmbedError("; ".join(left_out.values()))
    left_out |= _own_left_out(tables, config)
    for name, reason in left_out.items():
        logger.warning("%s is left out: %s", name, reason)
    prompts = tuple(strategy(name).name for name in options.ablation_prompts)
    evaluated = PromptVectors(model, readouts, prompts, config, image_source(config), "evaluated")
    fitted = None if inputs is None else PromptVectors(model, readouts, prompts, config, inputs.images, "fitted")
    before = model.prompt
    try:
        for words in evaluated.all_words():
            model.set_prompt(words.prompt)
            if fitted is not None and inputs is not None:
                fitted.encode(words, [ItemGroup(side, items, f"fit {side}") for side, items in inputs.of_sides])
            evaluated.encode(words, _items(tables, config))
    finally:
        model.set_prompt(before)
    combinations: list[Combination] = []
    errors: dict[tuple[str, int], RowError] = {}
    for prompt in prompts:
        maps = {} if fitted is None or inputs is None else _fit(fitted, inputs, prompt, config)
        table_of_prompt = _Scores(evaluated, prompt, readouts, maps, own=f"calibration {OWN}" not in left_out)
        for dataset, table in tables:
            for error in table_of_prompt.add(Plan(dataset, table, config), config):
                errors.setdefault((error.dataset, error.row), error)
            logger.info("%s: %s scored", prompt, dataset.name)
        combinations += table_of_prompt.combinations(config, inputs)
    num_rows = sum(score.num_errors + len(score.rows) for score in combinations[0].scores)
    return AblationResult(
        benchmark=chosen,
        combinations=tuple(combinations),
        left_out=left_out,
        num_encoded=evaluated.num_encoded + (0 if fitted is None else fitted.num_encoded),
        num_scored=num_rows - len(errors),
        errors=tuple(errors.values()),
        seconds=time.monotonic() - start,
        max_error_rate=config.max_error_rate,
    )


def _own_left_out(tables: Sequence[tuple[DatasetInfo, SubsetTable]], config: EvaluationConfig) -> dict[str, str]:
    """Return why no map can be fitted on the datasets' own inputs; empty if it can, on all of them."""
    try:
        for dataset, table in tables:
            require_own_inputs(dataset, table, config)
    except Gen2EmbedError as error:
        return {f"calibration {OWN}": str(error)}
    return {}


def _items(tables: Sequence[tuple[DatasetInfo, SubsetTable]], config: EvaluationConfig) -> Iterator[ItemGroup]:
    for dataset, table in tables:
        for side, items in Plan(dataset, table, config).items.items():
            yield ItemGroup(side, items, f"{dataset.name} {side}")


@dataclass(frozen=True)
class _Map:
    """A map that was fitted on training inputs, and on how many."""

    map: AffineMap
    num_inputs: int


def _fit(vectors: PromptVectors, inputs: FitInputs, prompt: str, config: EvaluationConfig) -> dict[Readout, _Map]:
    """Fit a map for each readout on the inputs under a prompt."""
    found = vectors.under(prompt)
    sums: dict[Readout, dict[Side, Moments]] = {one: {} for one in vectors.readouts}
    faults = []
    for side, items in inputs.of_sides:
        usable = []
        for item in items:
            fault = found.fault(side, item)
            if fault is None:
                usable.append(item)
            else:
                faults.append(fault)
                logger.warning("%s: %s", fault.file or item.text[:40], fault.reason)
        for start in range(0, len(usable), _CHUNK):
            for one, part in split(found.vectors(side, usable[start : start + _CHUNK]), vectors.readouts).items():
                sums[one].setdefault(side, Moments(part.shape[1])).add(part)
    bad = len(faults) + inputs.num_rejected
    total = len(inputs.queries) + len(inputs.documents) + inputs.num_rejected
    if bad > config.max_error_rate * total:
        first = f"; the first: {faults[0].file}: {faults[0].reason}" if faults else ""
        raise Gen2EmbedError(
            f"{bad} of {total} inputs of ablation_data {inputs.data} cannot be used{first}; mend them, or raise "
            "--max_error_rate"
        )
    maps = {}
    for one, moments in sums.items():
        if len(moments) < 2:
            raise Gen2EmbedError(f"ablation_data {inputs.data}: no input of one side can be used")
        fitted = fit(moments["query"], moments["document"], data=inputs.data)
        maps[one] = _Map(AffineMap.of(fitted), fitted.record.num_queries + fitted.record.num_documents)
    return maps


class _Scores:
    """The scores of all combinations under one prompt, dataset by dataset."""

    def __init__(
        self,
        vectors: PromptVectors,
        prompt: str,
        readouts: tuple[Readout, ...],
        maps: Mapping[Readout, _Map],
        *,
        own: bool,
    ) -> None:
        """Keep the arguments; nothing is scored yet."""
        self._vectors, self._prompt, self._readouts, self._maps = vectors, prompt, readouts, maps
        self._calibrations = (NONE, *((FITTED,) if maps else ()), *((OWN,) if own else ()))
        self._scores: dict[tuple[Readout, str, str], list[DatasetScore]] = {
            (readout, calibration, scoring): []
            for readout in readouts
            for calibration in self._calibrations
            for scoring in ("cosine", "csls")
        }

    def add(self, plan: Plan, config: EvaluationConfig) -> list[RowError]:
        """Score a dataset, and return the rows that were set aside."""
        found = Found(self._vectors.under(self._prompt), plan)
        rejected = found.rejected()
        parts = {side: split(vectors, self._readouts) for side, vectors in found.vectors.items()}
        for readout in self._readouts:
            of_readout = found.with_vectors({side: part[readout] for side, part in parts.items()})
            for calibration in self._calibrations:
                settings = replace(config, calibration="" if calibration == NONE else calibration)
                stored = self._maps[readout].map if calibration == FITTED else None
                for scoring, rows, used in _score(of_readout, plan, settings, stored):
                    score = DatasetScore(plan.dataset, rows, len(rejected), used)
                    self._scores[readout, calibration, scoring].append(score)
        return rejected

    def combinations(self, config: EvaluationConfig, inputs: FitInputs | None) -> list[Combination]:
        """Return the rows of the table."""
        combinations = []
        for (readout, calibration, scoring), scores in self._scores.items():
            settings = replace(config, calibration=OWN if calibration == OWN else "", scoring=scoring)
            if calibration == FITTED and inputs is not None:
                number = self._maps[readout].num_inputs
                settings = replace(settings, calibrated_on=number, calibration_data=inputs.data)
            method = method_of(settings, sum(score.num_unlabelled for score in scores))
            combinations.append(Combination(self._prompt, readout, calibration, scoring, tuple(scores), method))
        return combinations


def _score(
    found: Found, plan: Plan, config: EvaluationConfig, stored: AffineMap | None
) -> Iterator[tuple[str, tuple[RowScore, ...], int]]:
    """Yield the scores of a dataset's rows by the cosine and by CSLS, and how many of its own inputs were used."""
    cosine = found.calibrated(config, stored)
    corrected = found.with_csls(cosine, config)
    side = plan.candidate_side
    rows: list[RowScore] = []
    rows_csls: list[RowScore] = []
    for row, places in found.scorable():
        products = inner_products(cosine.vectors[side][places.candidates], cosine.vectors["query"][places.query])
        rows.append(row_score(products, row.same_as_positive))
        if corrected.hubs is not None:
            rows_csls.append(row_score(csls(products, corrected.hubs[places.candidates]), row.same_as_positive))
    yield "cosine", tuple(rows), cosine.num_unlabelled
    yield "csls", tuple(rows_csls), corrected.num_unlabelled
