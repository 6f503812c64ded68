"""Which runs a table needs: each is a command as a user would type it, with a folder of its own.

Runs that decide the same figures have the same folder, whatever table they are for: Table II and Table IV share the
evaluations of `none` and `hierarchical`, Tables V and VII the model that SaHa made. What decides a run and is not the
default is in the name of its folder, as a digest, so that runs of other settings never meet there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gen2embed_mteb.embedder.families import check_num_crops
from gen2embed_mteb.embedder.prompts.strategies import strategy
from gen2embed_mteb.embedder.short_names import resolve
from gen2embed_mteb.mini.places import TRAIN_TABLES
from gen2embed_mteb.names import DEFAULT, MINI, MINI_FOLDER
from gen2embed_mteb.paper_tables.published import published
from gen2embed_mteb.table_command.models import family_of_model
from gen2embed_mteb.table_command.options import RAW, TRAINED, TableOptions
from gen2embed_mteb.table_command.training_plans import Trained, recipes

PLACEMENT = (
    "--device",
    "--use_cpu",
    "--batch_tokens",
    "--batch_size",
    "--num_workers",
    "--max_error_rate",
    "--overwrite",
)
"""Flags that say where and how fast a run is computed; they do not decide its figures."""

CROPS = "--num_crops"
GOING_ON = ("--resume_from_checkpoint", "true")
"""The words with which `train` goes on where it stopped; a run that was not begun is made without them."""


@dataclass(frozen=True)
class Run:
    """A command with a folder of its own.

    Attributes:
        folder: Where it writes.
        words: Its words after `gen2embed`.
    """

    folder: Path
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command: evaluate, sample or train."""
        return self.words[0]


@dataclass(frozen=True)
class OurRow:
    """A row of ours: where it stands, and which runs give its figures.

    Attributes:
        model: The model, as the user named it.
        labels: The cells of the label columns.
        evaluations: The evaluations that give its figures.
        after: As in `view.OurFigures`.
        sampling: The sampling of its training data, if its model is trained here.
        training: The training of its model, likewise.
    """

    model: str
    labels: tuple[str, ...]
    evaluations: tuple[Run, ...]
    after: str = ""
    sampling: Run | None = None
    training: Run | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        """Its runs in the order in which they are run."""
        return tuple(run for run in (self.sampling, self.training) if run is not None) + self.evaluations


@dataclass(frozen=True)
class Passed:
    """The flags that are passed on, as words: how a model is loaded, how it encodes, and what all commands share.

    Attributes:
        loading: Of `LoadingOptions`.
        encoding: Of `EncodingConfig` and `LinkOption`.
        training: What of them `train` takes, too.
    """

    loading: tuple[str, ...] = ()
    encoding: tuple[str, ...] = ()
    training: tuple[str, ...] = ()


class Plan:
    """What a table needs.

    Args:
        options: What is asked for.
        passed: The flags that are passed on to the runs.
    """

    def __init__(self, options: TableOptions, passed: Passed) -> None:
        """Lay out all rows and runs; nothing is read but the name of the default model."""
        self.options, self._passed = options, passed
        self.output_dir = Path(options.output_dir or f"results/tables{'-mini' if options.mini else ''}")
        rows = _ROWS.get(options.table, Plan._prompt_rows)(self)
        self.rows = [*rows, *(self._checkpoint_row(name) for name in options.checkpoint)]

    @property
    def runs(self) -> list[Run]:
        """All runs, each once, in an order in which they can be run."""
        return list({run.folder: run for row in self.rows for run in row.runs}.values())

    def _prompt_rows(self) -> list[OurRow]:
        """Return a row per model and prompt, at the table's end (II, VI, UniME's)."""
        labels = published(self.options.table).num_labels
        return [
            OurRow(model, (f"prompt {mode}", *["–"] * (labels - 1)), self._evaluations(model, mode))
            for model in self.options.models
            for mode in self.options.modes
        ]

    def _strategy_rows(self) -> list[OurRow]:
        """Return a row per model under each published row, with its strategy (III, IV)."""
        return [
            OurRow(model, row.labels, self._evaluations(model, strategy(row.prompt_mode).name), after=row.name)
            for row in published(self.options.table).rows
            for model in self.options.models
        ]

    def _trained_rows(self) -> list[OurRow]:
        """Return a row per model and recipe: V has one recipe, VII and VIII one per published row or column."""
        found = recipes(self.options.table, self.options.training)
        return [self._trained_row(model, one) for one in found for model in self.options.models]

    def _trained_row(self, model: str, recipe: Trained) -> OurRow:
        options, mode, name = self.options, recipe.prompt_mode, recipe.name
        source, training = standing_for(model), options.training
        data_dir = options.train_data_dir or _drawn_training_data(options)
        shared = ("--model_name", source, "--prompt_mode", mode)
        limit = ("--limit", str(training.train_limit)) if training.train_limit else ()
        data = ("--data_dir", data_dir, *_flag("image_dir", options.train_image_dir), *limit)
        loading, encoding = self._loading(source), self._passed.encoding
        choosing = ("--method", recipe.method, *recipe.sampling)
        folder = self._folder(source, f"sample-{name}", [*choosing, *limit, *loading, *encoding])
        vectors = self._folder(source, f"vectors-{mode}", [*limit, *loading, *encoding])
        places: tuple[str, ...] = ("--output_dir", str(folder))
        places += ("--embedding_dir", str(vectors)) if recipe.method != "in-batch" else ()
        sampling = Run(folder, ("sample", *shared, *data, *choosing, *places, *loading, *encoding))
        settings = (*recipe.training, *self._passed.training)
        folder = self._folder(source, f"train-{name}", [*choosing, *limit, *settings, *loading, *encoding])
        places = ("--processed_data_path", str(sampling.folder), "--output_dir", str(folder))
        trained = Run(folder, ("train", *shared, *places, *settings, *GOING_ON, "--report_to", "none"))
        evaluation = self._evaluation(self._benchmark(), str(folder), mode, loading, beside=folder)
        labels = recipe.labels if options.table != "V" else (recipe.title, Path(source).name, "–")
        return OurRow(model, labels, (evaluation,), recipe.after, sampling, trained)

    def _checkpoint_row(self, name: str) -> OurRow:
        labels = published(self.options.table).num_labels
        return OurRow(name, ("checkpoint", *["–"] * (labels - 1)), self._evaluations(name, "hierarchical"))

    def _benchmark(self) -> str:
        """Return the benchmark of the table; SugarCrepe stands for itself and SugarCrepe++."""
        name = {"VI": "sugarcrepe", "unime-diverse": "diverse"}.get(self.options.table, "mmeb")
        return f"{name}-mini" if self.options.mini else name

    def _evaluations(self, model: str, mode: str) -> tuple[Run, ...]:
        benchmark = self._benchmark()
        both = [benchmark] if self.options.table != "VI" else [benchmark, benchmark.replace("crepe", "crepe++")]
        if self.options.table == "unime-diverse" and self.options.mini:
            both.append("sugarcrepe-mini")
        source = standing_for(model)
        return tuple(self._evaluation(one, source, mode, self._loading(source)) for one in both)

    def _loading(self, model: str) -> tuple[str, ...]:
        """Return the words that load a model: `num_crops` only for those that have it, if there are several models."""
        words = self._passed.loading
        several = len({*self.options.models, *self.options.checkpoint}) > 1
        if CROPS not in words or not several or check_num_crops(family_of_model(model), None):
            return words
        at = words.index(CROPS)
        return (*words[:at], *words[at + 2 :])

    def _evaluation(
        self, benchmark: str, model: str, mode: str, loading: Sequence[str], beside: Path | None = None
    ) -> Run:
        """Return an evaluation; that of a model which is trained here has its folder beside the model's."""
        options = self.options
        layout = RAW if mode == RAW else options.layout
        data_dir = options.plus_data_dir if "++" in benchmark and not options.mini else options.data_dir
        plain = self.options.table == "unime-diverse" and benchmark.startswith("sugarcrepe")
        decisive = (
            *(("--plain_captions",) if plain else ()),
            *(("--layout", layout) if layout != "native" else ()),
            *(("--limit", str(options.limit)) if options.limit else ()),
            *loading,
            *self._passed.encoding,
        )
        if beside is None:
            place = self._folder(model, f"{benchmark}-{mode}", decisive)
        else:
            place = beside.with_name(f"{beside.name}-{benchmark}{_suffix(decisive)}")
        words: tuple[str, ...] = ("evaluate", "--benchmark", benchmark, "--model_name", model)
        words += ("--prompt_mode", "none" if mode == RAW else mode)
        words += (*_flag("data_dir", data_dir), *_flag("image_dir", options.image_dir), "--output_dir", str(place))
        return Run(place, (*words, *decisive))

    def _folder(self, model: str, name: str, decisive: Sequence[str]) -> Path:
        """Return the folder of a run: by model, by name, and by a digest of what is not the default, if anything is."""
        name = f"mini-{name}" if self.options.mini and "-mini" not in name else name
        return self.output_dir / "runs" / slug(model) / f"{name.replace(':', '-')}{_suffix(decisive)}"


_ROWS = {
    "III": Plan._strategy_rows,
    "IV": Plan._strategy_rows,
    **dict.fromkeys(TRAINED, Plan._trained_rows),
}


def standing_for(model: str) -> str:
    """Return the model that `gen2embed` stands for; any other name as it is.

    Args:
        model: What the user typed. The short name can be pointed at another model at any time, so runs are not kept
            under it.
    """
    if model != DEFAULT:
        return model
    found = resolve(model) or model
    return MINI if found == str(MINI_FOLDER) else found


def slug(model: str) -> str:
    """Return a name for the folder of a model's runs.

    Args:
        model: A hub id, short name or directory; directories of the same name get different names.
    """
    if Path(model).expanduser().is_dir() or model.startswith((".", "/", "~")):
        place = Path(model).expanduser().resolve()
        return f"{place.name}-{_digest(str(place))}"
    return model.replace("/", "--")


def _drawn_training_data(options: TableOptions) -> str:
    """Return MMEB-mini's training pairs as `sample` takes them; it draws those of the default folder itself."""
    return str(Path(options.data_dir) / TRAIN_TABLES) if options.data_dir else "mmeb-mini"


def _flag(name: str, value: str) -> tuple[str, ...]:
    return (f"--{name}", value) if value else ()


def _suffix(decisive: Sequence[str]) -> str:
    kept = _deciding(decisive)
    return f"-{_digest(json.dumps(kept))}" if kept else ""


def _deciding(words: Sequence[str]) -> list[str]:
    """Return words without the flags of `PLACEMENT` and their values."""
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in PLACEMENT
        if not skipping:
            kept.append(word)
    return kept


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
