"""The benchmarks that `gen2embed evaluate` knows by name; the modules that run them are imported when needed."""

from __future__ import annotations

from typing import Any

from gen2embed_mteb.errors import Gen2EmbedError

RETRIEVAL = ("flickr30k", "coco", "sharegpt4v", "urban1k", "diverse", "diverse-mini")
BENCHMARKS = (
    *("mmeb", "mmeb-mini", "sugarcrepe", "sugarcrepe++", "sugarcrepe-mini", "sugarcrepe++-mini"),
    *RETRIEVAL,
)


def open_benchmark(name: str, data_dir: str, image_dir: str) -> tuple[Any, Any, str, str]:
    """Return what runs the benchmark, what checks its output folder, and where its data and images are.

    Args:
        name: One of `BENCHMARKS`.
        data_dir: Where its tables are; for an embedded one, where it is kept, or empty.
        image_dir: Where its images are; not used by the embedded ones.

    Returns:
        A function of encoder, configuration and what reranks (or None) that returns the result and its table as text; a
        function of the configuration that raises an error if the output folder cannot be used, or the benchmark does
        not rerank; the folder of the tables; that of the images.
    """
    from gen2embed_mteb.evaluation.applied_calibration import refuse_comparison
    from gen2embed_mteb.evaluation.run_folder import check_reports
    from gen2embed_mteb.mini.places import crepe_places, evaluation_places

    if name.startswith("sugarcrepe"):
        from gen2embed_mteb.sugarcrepe import evaluate as sugarcrepe

        plus = "++" in name
        benchmark = sugarcrepe.SUGARCREPE_PLUS_BENCHMARK if plus else sugarcrepe.SUGARCREPE_BENCHMARK
        if name.endswith("-mini"):
            from gen2embed_mteb.mini.benchmark import ensure

            data_dir, image_dir = map(str, crepe_places(ensure("crepe", data_dir or None), plus=plus))

        def run_captions(encoder: Any, config: Any, judge: Any = None) -> tuple[Any, str]:
            captions = sugarcrepe.evaluate_captions(encoder, benchmark, config)
            return captions, sugarcrepe.text_table(captions, config)

        def check_captions(config: Any) -> None:
            refuse_comparison(config, benchmark.title)
            if config.rerank is not None:
                raise Gen2EmbedError(f"--rerank is for MMEB and mmeb-mini; leave it out for --benchmark {name}")
            check_reports(config, benchmark.name)

        return run_captions, check_captions, data_dir, image_dir

    if name in RETRIEVAL:
        return _open_retrieval(name, data_dir, image_dir)

    from gen2embed_mteb.mmeb import MMEB
    from gen2embed_mteb.mmeb.evaluate import evaluate
    from gen2embed_mteb.mmeb.report import text_table

    table = MMEB
    if name == "mmeb-mini":
        from gen2embed_mteb.mini.benchmark import MMEB_MINI, ensure

        table = MMEB_MINI
        data_dir, image_dir = map(str, evaluation_places(ensure("eval", data_dir or None)))

    def run(encoder: Any, config: Any, judge: Any = None) -> tuple[Any, str]:
        result = evaluate(encoder, table, config, judge=judge)
        return result, text_table(result, config)

    def check(config: Any) -> None:
        check_reports(config, table.name, table.select(config.subsets, config.meta_tasks).names)

    return run, check, data_dir, image_dir


def _open_retrieval(name: str, data_dir: str, image_dir: str) -> tuple[Any, Any, str, str]:
    """Return the same for images with captions."""
    from gen2embed_mteb.evaluation.run_folder import check_reports
    from gen2embed_mteb.retrieval.evaluate import chosen, evaluate_retrieval, text_table

    if name == "diverse-mini":
        from gen2embed_mteb.mini.benchmark import ensure
        from gen2embed_mteb.mini.places import DIVERSE

        data_dir, image_dir = str(ensure("diverse", data_dir or None) / DIVERSE), ""

    def run(encoder: Any, config: Any, judge: Any = None) -> tuple[Any, str]:
        result = evaluate_retrieval(encoder, name, config)
        return result, text_table(result, config)

    def check(config: Any) -> None:
        if config.rerank is not None:
            raise Gen2EmbedError(f"--rerank is for MMEB and mmeb-mini; leave it out for --benchmark {name}")
        chosen(name, config)
        check_reports(config, name)

    return run, check, data_dir, image_dir
