"""Does Matryoshka training make the first dimensions useful? `gen2embed-mini` on MMEB-mini, at several widths.

python benchmarks/matryoshka.py --output benchmarks/results/matryoshka.json

Three models are compared, each at every width by vectors that were encoded once and cut: the model as it is, the same
after a short fine-tuning, and after the same fine-tuning with --matryoshka_dims. Both runs see the same batches of the
same seed; the weights of the widths sum to 1, so that the learning rate means the same in both. Everything is done by
`gen2embed sample`, `train` and `evaluate`, as a user would.

Runs are kept in --work_dir, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from gen2embed_mteb import cli
from gen2embed_mteb.evaluation.run import installed_versions
from gen2embed_mteb.mini.benchmark import ensure
from gen2embed_mteb.storage.developer_files import write_json

MODEL = "gen2embed-mini"


def main() -> None:
    """Train what is missing, evaluate every model at every width, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work_dir", type=Path, default=Path("results/matryoshka"))
    parser.add_argument("--dims", type=int, nargs="+", default=[192, 64, 16], help="at which the loss is computed")
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 64, 32, 16], help="at which is evaluated")
    parser.add_argument("--subsets", nargs="+", default=["ColorShape", "Scenes_t2i", "Scenes_i2t"])
    parser.add_argument("--max_steps", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--eval_limit", type=int, default=100, help="rows per dataset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    config = parser.parse_args()
    for part in ("train", "eval"):
        ensure(part)
    sampled = config.work_dir / "sampled"
    _run("sample", "--data_dir", "mmeb-mini", "--method", "in-batch", "--subsets", *config.subsets, output=sampled)
    weights = [str(1 / len(config.dims))] * len(config.dims)
    matryoshka = ["--matryoshka_dims", *map(str, config.dims), "--matryoshka_weights", *weights]
    figures: dict[str, dict[str, dict[str, float]]] = {"as it is": {"": _evaluated(MODEL, "as-it-is", config)}}
    for name, more in (("fine-tuned", []), ("fine-tuned with Matryoshka", matryoshka)):
        figures[name] = {}
        for seed in config.seeds:
            slug = f"{name.replace(' ', '-').lower()}-{seed}"
            words = ["--processed_data_path", str(sampled), "--max_steps", str(config.max_steps), "--seed", str(seed)]
            words += ["--batch_size", str(config.batch_size), "--learning_rate", str(config.learning_rate)]
            words += ["--warmup_steps", "2", "--lora_dropout", "0", "--sub_batch_size", "32", "--resize", "processor"]
            words += ["--save_strategy", "no", "--use_cpu", "--report_to", "none", "--model_name", MODEL, *more]
            if not (config.work_dir / slug / "modules.json").is_file():
                shutil.rmtree(config.work_dir / slug, ignore_errors=True)
                _run("train", *words, output=config.work_dir / slug)
            figures[name][str(seed)] = _evaluated(str(config.work_dir / slug), slug, config)
    for name, seeds in figures.items():
        for seed, of_seed in seeds.items():
            sys.stdout.write(f"{name} {seed}: " + ", ".join(f"{w} {100 * p:.1f}" for w, p in of_seed.items()) + "\n")
    settings = {name: value for name, value in vars(config).items() if name not in ("output", "work_dir")}
    command = f"python benchmarks/matryoshka.py --output {config.output}"
    record = {"command": command, "settings": settings, "versions": installed_versions(), "overall": figures}
    write_json(config.output, {**record, "written": datetime.now(UTC).date().isoformat()})


def _run(command: str, *words: str, output: Path) -> None:
    status = cli.main([command, *words, "--output_dir", str(output)])
    if status:
        raise SystemExit(status)


def _evaluated(model: str, slug: str, config: argparse.Namespace) -> dict[str, float]:
    """Return Precision@1 over the datasets at every width."""
    figures = {}
    for width in config.widths:
        output = config.work_dir / "evaluated" / f"{slug}-{width}"
        words = ["--benchmark", "mmeb-mini", "--model_name", model, "--subsets", *config.subsets]
        words += ["--limit", str(config.eval_limit), "--truncate_dim", str(width)]
        vectors = config.work_dir / "vectors" / slug
        _run("evaluate", *words, "--embedding_dir", str(vectors), output=output)
        figures[str(width)] = json.loads((output / "results.json").read_text())["overall"]
    return figures


if __name__ == "__main__":
    main()
