"""The command line: `gen2embed <command>`. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen2embed_mteb.errors import GO_ON, Gen2EmbedError, run_command
from gen2embed_mteb.launcher import end_with_launcher
from gen2embed_mteb.storage.paths import expand_home
from gen2embed_mteb.version import __version__

BENCHMARKS = ("mmeb", "mmeb-mini", "sugarcrepe", "sugarcrepe++", "sugarcrepe-mini", "sugarcrepe++-mini")
DEFAULT_MODEL = "gen2embed"
PASSING_ON = ("train", "mteb")
"""Commands that read their flags themselves."""
SHARED = ("evaluate", "sample", "train")
"""Commands that `torchrun` may start several times, to share the work."""


class _Parser(argparse.ArgumentParser):
    """Accepts `--data-dir` for `--data_dir`, and refuses abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Spell flags with underscores before argparse sees them."""
        given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_underscored(word) for word in given], namespace)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `gen2embed`; `None` takes them from the command line.

    Returns:
        The exit status: 0, 1 for a run with too many bad rows, 2 for input that cannot be used.
    """
    parser = _build_parser()
    given = expand_home(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(given)
    if rest and arguments.command not in PASSING_ON:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    if arguments.command == "mteb":  # its flags keep their dashes
        arguments.rest = given[given.index("mteb") + 1 :]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in ("gen2embed_mteb", "trainers", "vlm2vec_adapter"):
        logging.getLogger(package).setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    if arguments.command in SHARED:
        end_with_launcher()
    return run_command(
        f"gen2embed {arguments.command}",
        lambda: arguments.run(arguments),
        show_tracebacks=arguments.verbose,
        go_on=f"{GO_ON} with --resume_from_checkpoint true" if arguments.command == "train" else GO_ON,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gen2embed", description="A generative LLM as an embedding model, by prompt alone.")
    parser.add_argument("--version", action="version", version=f"gen2embed {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for name, summary, add, run in (
        (
            "demo",
            "the paper's effect on the embedded model, then SaHa and a short fine-tuning, with a report",
            _add_demo,
            _demo,
        ),
        ("evaluate", "MMEB, MMEB-mini, SugarCrepe, SugarCrepe++", _add_evaluate, _evaluate),
        ("sample", "SaHa: clusters of hard negatives from training pairs, offline", _add_sample, _sample),
        ("train", "fine-tune on what `sample` wrote; --help lists every flag", lambda _: None, _train),
        ("inspect", "a page on which a person can judge clusters", _add_inspect, _inspect),
        ("export", "write a directory that plain SentenceTransformer loads", _add_export, _export),
        ("mteb", "mteb's own command line, with the models and tasks of Gen2Embed in it", lambda _: None, _mteb),
        ("doctor", "what is installed, what is missing, which extra mends it", lambda _: None, _doctor),
    ):
        command = commands.add_parser(name, help=summary, description=summary, add_help=name not in PASSING_ON)
        command.add_argument("--verbose", action="store_true", help="log what is done, and show tracebacks")
        add(command)
        command.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt_mode", default=None, help="strategy (default: hierarchical, or an export's own)")
    parser.add_argument("--adapter", default=None, help="LoRA or DoRA adapter: directory or hub id")
    parser.add_argument("--revision", default=None, help="revision of the model on the hub")
    parser.add_argument("--max_length", type=int, default=None, help="longest input in tokens")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, float16, auto")


def _model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `_add_model` asked for, as `Gen2Embed` takes it."""
    return {
        "prompt_mode": arguments.prompt_mode,
        "adapter": arguments.adapter,
        "revision": arguments.revision,
        "max_length": arguments.max_length,
        "device": arguments.device or _device_of_rank(),
        "model_kwargs": {"dtype": arguments.dtype} if arguments.dtype else None,
    }


def _device_of_rank() -> str | None:
    """The GPU of this process under torchrun; `None` leaves the choice to sentence-transformers."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return None
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name", "--model_name_or_path", default=DEFAULT_MODEL, help="hub id, directory, name")
    _add_model(parser)
    parser.add_argument("--benchmark", choices=BENCHMARKS, default="mmeb")
    parser.add_argument("--data_dir", default=None, help="folder or hub id of the data; the -mini ones draw their own")
    parser.add_argument("--image_dir", default="", help="folder or .zip of the images; default: beside the data")
    parser.add_argument(
        "--follow_links", action="store_true", help="follow links in the image folder that lead out of it"
    )
    parser.add_argument("--output_dir", default=None, help="default: results/<benchmark>/<model>/<prompt_mode>")
    parser.add_argument("--eval_split", default="test")
    parser.add_argument("--subsets", nargs="+", default=(), help="datasets to run (default: all)")
    parser.add_argument("--meta_task", nargs="+", default=(), help="Classification, VQA, Retrieval, Grounding")
    parser.add_argument("--limit", type=int, default=None, help="rows a dataset, from the first")
    parser.add_argument("--layout", choices=("native", "official"), default="native", help="image layout in the prompt")
    parser.add_argument("--resize", default="processor", help="processor, official, square-448")
    parser.add_argument("--min_side", type=int, default=28, help="smaller images are enlarged; 0: never")
    _add_encoding(parser)
    _add_limits(parser)
    parser.add_argument("--max_error_rate", type=float, default=0.001, help="share of bad rows that fails the run")
    parser.add_argument("--overwrite", action="store_true", help="replace vectors and reports of another run")


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch_tokens", type=int, help="tokens a call (default: 1024 on a CPU, 8192 on a GPU)")
    parser.add_argument("--batch_size", type=int, default=512, help="inputs a call of the model, at most")
    parser.add_argument("--num_workers", type=int, default=4, help="threads that open images")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Flags of `rows.RowLimits`."""
    from gen2embed_mteb.data_files.rows import RowLimits

    for field in dataclasses.fields(RowLimits):
        text = f"{field.metadata['help']}; a row beyond it is set aside (default: {field.default})"
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=text)


def _evaluate(arguments: argparse.Namespace) -> int:
    from gen2embed_mteb.embedder.fingerprint import fingerprint
    from gen2embed_mteb.evaluation import run as evaluation
    from gen2embed_mteb.evaluation.run_folder import UNKNOWN

    run, check, data_dir, image_dir = _benchmark(arguments)
    if not data_dir:
        raise Gen2EmbedError(f"--data_dir is needed for --benchmark {arguments.benchmark}")
    mode = arguments.prompt_mode or "hierarchical"
    label = Path(arguments.model_name).name
    settings = {
        "data_dir": str(data_dir),
        "image_dir": str(image_dir),
        "output_dir": arguments.output_dir or str(Path("results") / arguments.benchmark / label / mode),
        "split": arguments.eval_split,
        "subsets": tuple(arguments.subsets),
        "meta_tasks": tuple(arguments.meta_task),
        "model_name": arguments.model_name,
        "prompt_mode": mode,
    }
    as_given = (
        "limit",
        "resize",
        "min_side",
        "follow_links",
        "batch_tokens",
        "batch_size",
        "num_workers",
        "max_text_chars",
        "max_candidates",
        "max_row_bytes",
        "max_error_rate",
        "overwrite",
    )
    for name in as_given:
        settings[name] = getattr(arguments, name)
    # Settings and the output folder are checked before a model is loaded, which can take minutes.
    check(evaluation.EvaluationConfig(**settings, fingerprint=UNKNOWN))
    from gen2embed_mteb.embedder.model import Gen2Embed
    from gen2embed_mteb.embedder.prefix_cache import PrefixEncoder

    options = _model_options(arguments) | {"min_side": arguments.min_side}
    model = Gen2Embed(arguments.model_name, layout=arguments.layout, **options)
    settings |= {"prompt_mode": model.prompt_mode, "revision": model.revision, "fingerprint": fingerprint(model)}
    result, table = run(PrefixEncoder(model), evaluation.EvaluationConfig(**settings))
    if evaluation.is_first_process():
        print(table)
        print(f"\nWritten to {settings['output_dir']}")
        if result.verdict:
            print(result.verdict)
    return int(result.too_many_errors)


def _benchmark(arguments: argparse.Namespace) -> tuple[Any, Any, str, str]:
    """What runs the benchmark, what checks its output folder, and where its data and images are."""
    from gen2embed_mteb.evaluation.run_folder import check_reports

    name, data_dir, image_dir = arguments.benchmark, arguments.data_dir or "", arguments.image_dir
    if name.startswith("sugarcrepe"):
        from gen2embed_mteb.sugarcrepe import evaluate as compositionality

        plus = "++" in name
        benchmark = compositionality.SUGARCREPE_PLUS_BENCHMARK if plus else compositionality.SUGARCREPE_BENCHMARK
        if name.endswith("-mini"):
            from gen2embed_mteb.mini.benchmark import ensure

            root = ensure("crepe", arguments.data_dir)
            data_dir, image_dir = str(root / ("SugarCrepe++" if plus else "SugarCrepe")), str(root / "val2017")

        def run_captions(encoder: Any, config: Any) -> tuple[Any, str]:
            captions = compositionality.evaluate_captions(encoder, benchmark, config)
            return captions, compositionality.text_table(captions)

        return run_captions, lambda config: check_reports(config, benchmark.name), data_dir, image_dir

    from gen2embed_mteb.mmeb import MMEB
    from gen2embed_mteb.mmeb.evaluate import evaluate
    from gen2embed_mteb.mmeb.report import text_table

    table = MMEB
    if name == "mmeb-mini":
        from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure

        table, root = MMEB_MINI, ensure("eval", arguments.data_dir)
        data_dir, image_dir = str(root / "MMEB-eval"), str(root / "images")

    def run(encoder: Any, config: Any) -> tuple[Any, str]:
        result = evaluate(encoder, table, config)
        return result, text_table(result, config)

    def check(config: Any) -> None:
        check_reports(config, table.name, table.select(config.subsets, config.meta_tasks).names)

    return run, check, data_dir, image_dir


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_name", "--model_name_or_path", default=DEFAULT_MODEL, help="hub id, directory, name")
    _add_model(parser)
    parser.add_argument("--data_dir", required=True, help="training pairs: folder, file or hub id, or mmeb-mini")
    parser.add_argument("--image_dir", default="", help="folder or .zip of the images; default: beside the data")
    parser.add_argument(
        "--follow_links", action="store_true", help="follow links in the image folder that lead out of it"
    )
    parser.add_argument("--output_dir", required=True, help="where the files go, one Parquet a subset")
    parser.add_argument("--embedding_dir", default="", help="vectors, to share among runs; default: in output_dir")
    parser.add_argument("--method", choices=("saha", "hn", "hn-beta", "in-batch"), default="saha")
    parser.add_argument("--num_hard_negatives", type=int, default=7, help="k")
    parser.add_argument("--pool_multiplier", type=int, default=6, help="m: saha's pool holds m k candidates")
    parser.add_argument("--variant", choices=("paper", "official"), default="paper", help="of Algorithm 1")
    parser.add_argument("--beta", type=float, default=0.02, help="margin of hn-beta")
    parser.add_argument("--split", default="", help="default: original in MMEB-train's form, train elsewhere")
    parser.add_argument("--subsets", nargs="+", default=(), help="subsets to sample (default: all)")
    parser.add_argument("--columns", nargs=2, default=(), help="the query's and its positive's, in data of two columns")
    parser.add_argument("--image_columns", nargs="+", default=(), help="those of the two that hold paths of images")
    parser.add_argument("--limit", type=int, default=None, help="rows a subset, from the first")
    parser.add_argument("--format", choices=("parquet", "official"), default="parquet", help="official: its JSON too")
    parser.add_argument("--layout", choices=("native", "official"), default="native", help="image layout in the prompt")
    parser.add_argument("--resize", default="processor", help="processor, official, square-448")
    parser.add_argument("--min_side", type=int, default=28, help="smaller images are enlarged; 0: never")
    _add_encoding(parser)
    _add_limits(parser)
    parser.add_argument("--max_error_rate", type=float, default=0.001, help="share of bad rows that fails the run")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_false", dest="overwrite", help="go on where a run stopped (default)")
    again.add_argument("--overwrite", action="store_true", help="replace what was made with other settings or models")
    parser.set_defaults(overwrite=False)


def _sample(arguments: argparse.Namespace) -> int:
    from gen2embed_mteb.evaluation.run import is_first_process
    from trainers.data.training_data import open_training_data
    from trainers.sampling.outputs import check_outputs
    from trainers.sampling.sample import ModelRecord, SampleConfig, sample, text_table

    names = {field.name for field in dataclasses.fields(SampleConfig)} - {"file_format"}
    settings = {name: getattr(arguments, name) for name in names}
    for name in ("subsets", "columns", "image_columns"):
        settings[name] = tuple(settings[name])
    config = SampleConfig(**settings, file_format=arguments.format)
    # Settings, tables and the output folder are checked before a model is loaded, which can take minutes.
    data = open_training_data(config, config.images_cache)
    if is_first_process():
        check_outputs(data, config)
    encoder, record = None, ModelRecord()
    if config.method != "in-batch":
        from gen2embed_mteb.embedder.fingerprint import fingerprint
        from gen2embed_mteb.embedder.model import Gen2Embed
        from gen2embed_mteb.embedder.prefix_cache import PrefixEncoder

        options = _model_options(arguments) | {"min_side": arguments.min_side}
        model = Gen2Embed(arguments.model_name, layout=arguments.layout, **options)
        encoder = PrefixEncoder(model)
        record = ModelRecord(arguments.model_name, model.revision, model.prompt_mode, fingerprint(model))
    result = sample(encoder, record, data, config)
    if is_first_process():
        print(text_table(result))
        before = len(result.records) - len(result.made)
        kept = f"; {before} of {len(result.records)} subsets were finished before" if before else ""
        print(f"\nWritten to {config.output_dir}{kept}")
        if result.verdict:
            print(result.verdict)
    return int(result.too_many_errors)


def _train(arguments: argparse.Namespace) -> None:
    from trainers.train import run

    run(arguments.rest, prog="gen2embed train")


def _mteb(arguments: argparse.Namespace) -> None:
    """Importing this package has made sure that mteb learns of our models, start-up hook or not."""
    from mteb.cli import main as mteb_main

    given = sys.argv
    sys.argv = ["gen2embed mteb", *(arguments.rest or ["--help"])]
    try:
        mteb_main()
    finally:
        sys.argv = given


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="SUBSET.parquet or .json that `sample` wrote, or SUBSET_hard_negatives.json")
    parser.add_argument("--output", default=None, help="the page; default: SUBSET.html beside the file")
    parser.add_argument("--data_dir", default="", help="the training pairs, where they are not where the file says")
    parser.add_argument("--image_dir", default="", help="their images, likewise")
    parser.add_argument(
        "--follow_links", action="store_true", help="follow links in the image folder that lead out of it"
    )
    parser.add_argument("--num_clusters", type=int, default=20, help="clusters to show, at even distances")


def _inspect(arguments: argparse.Namespace) -> None:
    from trainers.sampling.viewer import inspect

    page = inspect(
        arguments.file,
        arguments.output,
        data_dir=arguments.data_dir,
        image_dir=arguments.image_dir,
        follow_links=arguments.follow_links,
        num_clusters=arguments.num_clusters,
    )
    print(f"Written to {page}")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="base model, adapter or export: hub id, directory or short name")
    parser.add_argument("output", help="directory to write; must be empty or absent")
    _add_model(parser)


def _export(arguments: argparse.Namespace) -> None:
    from gen2embed_mteb.embedder.export import export

    output = export(arguments.model, arguments.output, **_model_options(arguments))
    print(f'Written to {output}. Load it with SentenceTransformer("{output}").')


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="where results and the report go")
    parser.add_argument("--data_dir", type=Path, default=None, help="where MMEB-mini is kept (default: user's cache)")
    parser.add_argument("--limit", type=int, default=None, help="rows a dataset, for a quick look")
    parser.add_argument("--max_steps", type=int, default=24, help="steps of fine-tuning; 0: zero-shot only")


def _demo(arguments: argparse.Namespace) -> None:
    from functools import partial

    from gen2embed_mteb.demo.run import run_demo

    places = (arguments.output_dir, arguments.data_dir, arguments.limit)
    step = None
    if arguments.max_steps < 0:
        raise Gen2EmbedError(f"max_steps is {arguments.max_steps}; pass 1 or more, or 0 for zero-shot only")
    if arguments.max_steps:
        from trainers.demo import fine_tune

        step = partial(fine_tune, *places, arguments.max_steps)
    for line in run_demo(*places, fine_tune=step):
        print(line, flush=True)


def _doctor(_: argparse.Namespace) -> int:
    from gen2embed_mteb.doctor import diagnose

    healthy, text = diagnose()
    print(text)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
