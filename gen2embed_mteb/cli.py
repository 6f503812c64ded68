"""The command line: `gen2embed <command>`. Each command imports what it needs when it runs.

Flags are fields of dataclasses (see `flags`); only the flags of the requested command are added to the parser.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from gen2embed_mteb.benchmarks import BENCHMARKS, open_benchmark
from gen2embed_mteb.errors import GO_ON, GO_ON_TRAINING, Gen2EmbedError, run_command
from gen2embed_mteb.flags import FlagParser, add_flags, check_options, from_flags, option
from gen2embed_mteb.launcher import end_with_launcher
from gen2embed_mteb.storage.paths import expand_home
from gen2embed_mteb.version import __version__

PACKAGES = ("gen2embed_mteb", "trainers", "vlm2vec_adapter")
"""The packages whose logging `--verbose` turns up."""


class Command(NamedTuple):
    """A command.

    Attributes:
        summary: What it does, for the help.
        add_flags: Adds its flags to a parser; None if it parses its flags itself.
        run: Runs it with the parsed arguments, and returns its exit status; None stands for 0.
        shared: Whether `torchrun` may start several processes of it that share the work.
        go_on: What the user can do after it was interrupted.
    """

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None] | None
    run: Callable[[argparse.Namespace], int | None]
    shared: bool = False
    go_on: str = GO_ON


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The words after `gen2embed`; None takes them from the command line.

    Returns:
        The exit status: 0, 1 for a run with too many bad rows, 2 for input that cannot be used.
    """
    given = expand_home(sys.argv[1:] if argv is None else argv)
    parser = build_parser(next((word for word in given if not word.startswith("-")), ""))
    arguments, rest = parser.parse_known_args(given)
    command = COMMANDS[arguments.command]
    if rest and command.add_flags is not None:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    if arguments.command == "mteb":  # its flags keep their dashes
        arguments.rest = given[given.index("mteb") + 1 :]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    if command.shared:
        end_with_launcher()
    return run_command(
        f"gen2embed {arguments.command}",
        lambda: command.run(arguments),
        show_tracebacks=arguments.verbose,
        go_on=command.go_on,
    )


def build_parser(*wanted: str) -> argparse.ArgumentParser:
    """Return the parser of the command line.

    Args:
        wanted: The commands whose flags are added; the others are only listed, so that their modules are not imported.
    """
    parser = FlagParser(prog="gen2embed", description="A generative LLM as an embedding model, by prompt alone.")
    parser.add_argument("--version", action="version", version=f"gen2embed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=FlagParser)
    for name, command in COMMANDS.items():
        summary = command.summary
        added = commands.add_parser(name, help=summary, description=summary, add_help=command.add_flags is not None)
        added.add_argument("--verbose", action="store_true", help="log what is done, and show tracebacks")
        if command.add_flags is not None and name in wanted:
            command.add_flags(added)
    return parser


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `evaluate` is asked for, beside the settings of the run."""

    benchmark: str = option("what to evaluate on", default="mmeb", choices=BENCHMARKS)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from gen2embed_mteb.config import AblationOptions, EvaluationConfig, ModelOptions

    add_flags(parser, EvaluateOptions)
    add_flags(parser, ModelOptions)
    add_flags(parser, EvaluationConfig, defaults={"data_dir": "", "output_dir": ""})
    add_flags(parser, AblationOptions)


def _evaluate(arguments: argparse.Namespace) -> int:
    from gen2embed_mteb.config import AblationOptions, ComparisonOptions, EvaluationConfig, ModelOptions
    from gen2embed_mteb.embedder.reranking.config import RerankOptions
    from gen2embed_mteb.evaluation.run import is_first_process
    from gen2embed_mteb.evaluation.run_folder import UNKNOWN

    asked = from_flags(EvaluateOptions, arguments)
    if (ablation := from_flags(AblationOptions, arguments)).ablation:
        from gen2embed_mteb.ablation_command import run_ablation

        text, status = run_ablation(arguments, ablation)
        print(text, end="")
        return status
    options = from_flags(ModelOptions, arguments)
    run, check, data_dir, image_dir = open_benchmark(asked.benchmark, arguments.data_dir, arguments.image_dir)
    if not data_dir:
        raise Gen2EmbedError(f"--data_dir is needed for --benchmark {asked.benchmark}")
    mode = options.prompt_mode or "hierarchical"
    pooled = "phrase" if options.pooling == "phrase" else ""
    run_name = "-".join(filter(None, (mode, options.readout, "raw" if options.readout_norm == "false" else "", pooled)))
    folder = Path("results") / asked.benchmark / Path(options.model_name).name
    names = from_flags(ComparisonOptions, arguments).comparison, from_flags(RerankOptions, arguments).reranking
    output_dir = arguments.output_dir or str(folder / "-".join(filter(None, (run_name, *names))))
    settings = {"data_dir": data_dir, "image_dir": image_dir, "output_dir": output_dir}
    if not (arguments.output_dir or arguments.embedding_dir):
        # The vectors of the model itself, whatever is done with them.
        settings["embedding_dir"] = str(folder / run_name / "embeddings")

    def config(**of_model: Any) -> EvaluationConfig:
        facts = {"revision": "", "prompt_mode": mode, "readout": "last"} | of_model
        made: EvaluationConfig = from_flags(EvaluationConfig, arguments, **settings, **facts)
        return made

    # Settings and the output folder are checked before a model is loaded, which can take minutes.
    checked = config(fingerprint=UNKNOWN)
    check(checked)
    from gen2embed_mteb.distributed.encoder import encoder_of_model
    from gen2embed_mteb.embedder.fingerprint import fingerprint
    from gen2embed_mteb.embedder.passes.phrase_pooling import state_name
    from gen2embed_mteb.evaluation.applied_calibration import require_fitting
    from gen2embed_mteb.evaluation.method import facts_of

    model = _load(options, checked)
    require_fitting(model, checked)
    of_model = {"prompt_mode": model.prompt_mode, "revision": model.revision, "fingerprint": fingerprint(model)}
    of_model |= {"readout": state_name(model), **facts_of(model, options.model_name)}
    judge = None
    if checked.rerank is not None:
        from gen2embed_mteb.mmeb.reranking.judge import open_judge

        judge = open_judge(model, checked.rerank, of_model["fingerprint"])
    with encoder_of_model(checked, model, options, of_model["fingerprint"]) as encoder:
        result, table = run(encoder, config(**of_model), judge)
    if is_first_process():
        print(table)
        print(f"\nWritten to {output_dir}")
        if result.verdict:
            print(result.verdict)
    return int(result.too_many_errors)


def _load(options: Any, config: Any) -> Any:
    """Return the model; bulk encoding resizes its images, and enlarges them by the same rule."""
    from gen2embed_mteb.embedder.model import Gen2Embed

    own = {"layout": options.layout, "pooling": options.pooling}
    return Gen2Embed(options.model_name, min_side=config.min_side, **own, **config.loading(options.arguments()))


def _add_sample(parser: argparse.ArgumentParser) -> None:
    from gen2embed_mteb.config import ModelOptions
    from trainers.sampling.config import SampleConfig

    add_flags(parser, ModelOptions)
    add_flags(parser, SampleConfig)


def _sample(arguments: argparse.Namespace) -> int:
    from gen2embed_mteb.config import ModelOptions
    from gen2embed_mteb.evaluation.run import is_first_process
    from trainers.data.training_data import open_training_data
    from trainers.sampling.config import ModelRecord, SampleConfig
    from trainers.sampling.outputs import check_outputs
    from trainers.sampling.sample import sample, text_table

    options = from_flags(ModelOptions, arguments)
    config = from_flags(SampleConfig, arguments)
    # Settings, tables and the output folder are checked before a model is loaded, which can take minutes.
    data = open_training_data(config, config.images_cache)
    if is_first_process():
        check_outputs(data, config)
    if config.method == "in-batch":
        result = sample(None, ModelRecord(), data, config)
    else:
        from gen2embed_mteb.distributed.encoder import encoder_of_model
        from gen2embed_mteb.embedder.fingerprint import fingerprint
        from gen2embed_mteb.embedder.passes.phrase_pooling import state_name

        model = _load(options, config)
        made = fingerprint(model), state_name(model)
        record = ModelRecord(options.model_name, model.revision, model.prompt_mode, *made)
        with encoder_of_model(config, model, options, made[0]) as encoder:
            result = sample(encoder, record, data, config)
    if is_first_process():
        print(text_table(result))
        before = len(result.records) - len(result.made)
        kept = f"; {before} of {len(result.records)} subsets were finished before" if before else ""
        print(f"\nWritten to {config.output_dir}{kept}")
        if result.verdict:
            print(result.verdict)
    return int(result.too_many_errors)


def _training(summary: str, module: str) -> Command:
    """Return a command that parses its flags itself: the `run` of a module."""

    def run(arguments: argparse.Namespace) -> None:
        import_module(module).run(arguments.rest, prog=f"gen2embed {arguments.command}")

    return Command(f"{summary}; --help lists every flag", None, run, shared=True, go_on=GO_ON_TRAINING)


def _mteb(arguments: argparse.Namespace) -> None:
    """Run mteb's command line; importing this package registers our models, even without the start-up hook."""
    from mteb.cli import main as mteb_main

    given = sys.argv
    sys.argv = ["gen2embed mteb", *(arguments.rest or ["--help"])]
    try:
        mteb_main()
    finally:
        sys.argv = given


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from trainers.sampling.viewer import InspectConfig

    add_flags(parser, InspectConfig)


def _inspect(arguments: argparse.Namespace) -> None:
    from trainers.sampling.viewer import InspectConfig, inspect

    page = inspect(**vars(from_flags(InspectConfig, arguments)))
    print(f"Written to {page}")


def _add_inspect_prompt(parser: argparse.ArgumentParser) -> None:
    from gen2embed_mteb.config import InspectPromptOptions

    add_flags(parser, InspectPromptOptions)


def _inspect_prompt(arguments: argparse.Namespace) -> None:
    from gen2embed_mteb.config import InspectPromptOptions
    from gen2embed_mteb.inspection.prompt_inspection import inspect_prompt

    print(inspect_prompt(**vars(from_flags(InspectPromptOptions, arguments))))


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `export` writes."""

    output: str = option("directory to write; must be empty or absent", positional=True)


def _add_export(parser: argparse.ArgumentParser) -> None:
    from gen2embed_mteb.config import LoadingOptions, ModelArgument
    from gen2embed_mteb.embedder.reranking.config import ExportKind
    from gen2embed_mteb.serving.options import UnmergedOption

    add_flags(parser, ModelArgument)
    add_flags(parser, ExportOptions)
    add_flags(parser, ExportKind)
    add_flags(parser, UnmergedOption)
    add_flags(parser, LoadingOptions)


def _export(arguments: argparse.Namespace) -> int:
    from gen2embed_mteb.config import LoadingOptions, ModelArgument
    from gen2embed_mteb.embedder.reranking.config import ExportKind
    from gen2embed_mteb.serving.options import UnmergedOption

    model, output = from_flags(ModelArgument, arguments).model, from_flags(ExportOptions, arguments).output
    asked, options = from_flags(ExportKind, arguments), from_flags(LoadingOptions, arguments).arguments()
    adapter_dir = from_flags(UnmergedOption, arguments).vllm_adapter
    if adapter_dir:
        from gen2embed_mteb.serving.lora import export_for_vllm

        if asked.kind == "reranker" or asked.check:
            raise Gen2EmbedError("--vllm_adapter goes with neither --as reranker nor --check; leave one of them out")
        print(export_for_vllm(model, output, adapter_dir, **options).told())
        return 0
    if asked.kind == "reranker":
        from gen2embed_mteb.embedder.reranking.export import export_reranker as export

        options["framing"] = asked.framing or "mcq"
    else:
        from gen2embed_mteb.embedder.export import export
    output = export(model, output, **options)
    client = "CrossEncoder" if asked.kind == "reranker" else "SentenceTransformer"
    print(f'Written to {output}. Load it with {client}("{output}").')
    from gen2embed_mteb.serving.plain_client import check_export

    return check_export(output, options["device"]) if asked.check else 0


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    from gen2embed_mteb.config import LoadingOptions, ModelArgument
    from trainers.calibration import CalibrateConfig

    add_flags(parser, ModelArgument)
    add_flags(parser, ExportOptions)
    add_flags(parser, LoadingOptions)
    add_flags(parser, CalibrateConfig)


def _calibrate(arguments: argparse.Namespace) -> None:
    from gen2embed_mteb.config import LoadingOptions, ModelArgument
    from trainers.calibration import CalibrateConfig, run

    model, output = from_flags(ModelArgument, arguments).model, from_flags(ExportOptions, arguments).output
    options = from_flags(LoadingOptions, arguments).arguments()
    print(run(options, model, output, from_flags(CalibrateConfig, arguments)))
    print(f'\nWritten to {output}. Load it with Gen2Embed("{output}") or SentenceTransformer("{output}").')


def _late(summary: str, module: str) -> Command:
    """Return a command of a module of its own, which has `add_command_flags` and `run_command_with`."""

    def add(parser: argparse.ArgumentParser) -> None:
        import_module(module).add_command_flags(parser)

    return Command(summary, add, lambda arguments: import_module(module).run_command_with(arguments))


COMMANDS = {
    "demo": _late(
        "the paper's effect on the embedded model, then SaHa and a short fine-tuning, with a report",
        "gen2embed_mteb.demo_command",
    ),
    "encode": _late(
        "vectors of a folder of pictures or of a table, in files that vector stores read",
        "gen2embed_mteb.encode_command.command",
    ),
    "search": _late("the rows of such an index that are nearest to a query", "gen2embed_mteb.search_command.command"),
    "evaluate": Command("MMEB, MMEB-mini, SugarCrepe, SugarCrepe++", _add_evaluate, _evaluate, shared=True),
    "table": _late(
        "a published table with our figures in it; runs what is missing of them", "gen2embed_mteb.table_command.command"
    ),
    "plan": _late("what a run will cost, before it starts: tokens, FLOP, hours", "gen2embed_mteb.planning.command"),
    "analyze": _late(
        "the paper's figures: attention, the space of vectors, the one word", "gen2embed_mteb.analysis.command"
    ),
    "sample": Command(
        "SaHa: clusters of hard negatives from training pairs, offline", _add_sample, _sample, shared=True
    ),
    "train": _training("fine-tune on what `sample` wrote", "trainers.fine_tuning"),
    "distill": _training("learn from a text encoder which texts are alike (UniME)", "trainers.distillation.distill"),
    "inspect": Command("a page on which a person can judge clusters", _add_inspect, _inspect),
    "inspect-prompt": Command(
        "what a model will read, and how its chat format was found; loads no weights",
        _add_inspect_prompt,
        _inspect_prompt,
    ),
    "calibrate": Command(
        "fit a calibration on unlabelled inputs, and write the model with it", _add_calibrate, _calibrate
    ),
    "export": Command("write a directory that plain SentenceTransformer, or CrossEncoder, loads", _add_export, _export),
    "push": _late("send a model or sampling files to the hub", "gen2embed_mteb.push_command.command"),
    "serving-check": _late("whether a server (vLLM) gives an export's own vectors", "gen2embed_mteb.serving.command"),
    "mteb": Command("mteb's own command line, with the models and tasks of Gen2Embed in it", None, _mteb),
    "doctor": _late(
        "what is installed, what is missing; with a model: whether its vectors can be relied on",
        "gen2embed_mteb.inspection.doctor_command",
    ),
}
"""The commands by name, in the order of the help."""


if __name__ == "__main__":
    sys.exit(main())
